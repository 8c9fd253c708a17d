// Drives csrc/threads.cpp, which it is compiled with: every part of every strand is run once, in order, by one thread at
// a time that sees what the others wrote, whatever the pool does, and what a part throws arrives.
//
//     native_threads_stress [ROUNDS]

#include <stdio.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "native_pools.h"
#include "threads.h"

using namespace blobloss;

namespace {

std::atomic<int> failures{0};

const bl_parallel_for kPools[] = {nullptr, fake_pool, patient_pool, refusing_pool};

// Not atomic: the strand itself must keep threads apart.
struct alignas(64) Progress {
  int64_t next = 0;
};

void report(const char* wrong, int64_t count, int64_t length, int64_t part, int64_t threads) {
  ++failures;
  printf("WRONG %s: %d strands of %d, parts of %d, %d threads\n", wrong, static_cast<int>(count),
         static_cast<int>(length), static_cast<int>(part), static_cast<int>(threads));
}

// `slow`: a thread waits in the last strand, so that the others run out of work.
void check(const bl_threads& threads, int64_t count, int64_t length, int64_t part, bool slow) {
  std::vector<Progress> strands(static_cast<size_t>(count));
  std::atomic<bool> in_order{true}, small{true};
  run_strands(threads, count, length, part, [&](int64_t i, int64_t begin, int64_t end) {
    Progress& strand = strands[static_cast<size_t>(i)];
    if (strand.next != begin) in_order = false;
    if (end <= begin || end > length) in_order = false;
    if (threads.count > 1 && count > 1 && end - begin > part) small = false;
    if (slow && i == count - 1 && begin == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    strand.next = end;
  });
  if (!in_order) report("order", count, length, part, threads.count);
  if (!small) report("size", count, length, part, threads.count);
  for (const Progress& strand : strands)
    if (strand.next != length) return report("end", count, length, part, threads.count);
}

// A thread that needs a millisecond for every part must leave its only strand to one that has nothing else to do.
void check_hand_over(bl_parallel_for pool) {
  std::thread::id first;
  bool by_another = false;
  run_strands({2, pool}, 2, 100, 1, [&](int64_t i, int64_t begin, int64_t) {
    if (i == 0) return;
    if (begin == 0) first = std::this_thread::get_id();
    if (std::this_thread::get_id() == first)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    else
      by_another = true;
  });
  if (!by_another) report("thread", 2, 100, 1, 2);
}

void check_throw(const bl_threads& threads, int64_t count, int64_t length, int64_t part) {
  try {
    run_strands(threads, count, length, part, [&](int64_t i, int64_t begin, int64_t end) {
      if (i == count / 2 && begin <= length / 2 && length / 2 < end) throw std::runtime_error("");
    });
  } catch (const std::runtime_error&) {
    return;
  }
  report("throw", count, length, part, threads.count);
}

void check_parallel(const bl_threads& threads, int64_t count) {
  std::vector<int> times(static_cast<size_t>(count));
  run_parallel(threads, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++times[static_cast<size_t>(i)];
  });
  for (const int n : times)
    if (n != 1) return report("parallel", count, 1, 1, threads.count);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 20;
  int cases = 0;
  for (int round = 0; round < rounds; ++round)
    for (const bl_parallel_for pool : kPools)
      for (const int64_t threads : {0, 1, 2, 3, 5}) {
        for (const int64_t count : {0, 1, 2, 4, 7, 16}) {
          for (const int64_t length : {0, 1, 2, 33})
            for (const int64_t part : {1, 2, 5, 64}) {
              check({threads, pool}, count, length, part, round % 4 == 3);
              if (count && length) check_throw({threads, pool}, count, length, part);
              ++cases;
            }
        }
        for (const int64_t count : {0, 1, 2, 5, 39, 40, 41, 1000}) check_parallel({threads, pool}, count);
      }
  check_hand_over(nullptr);
  check_hand_over(fake_pool);
  printf("%d cases: %d wrong\n", cases, failures.load());
  return failures.load() != 0;
}
