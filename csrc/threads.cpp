// No pool of its own, so that a forked child starts from nothing and unloading leaves no thread behind.

#include "threads.h"

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace blobloss {
namespace {

constexpr int64_t kPartsPerThread = 8;  // so that others can take over much of the share of a thread that is slow
constexpr int64_t kTaken = INT64_MAX;

struct alignas(64) Strand {
  std::atomic<int64_t> next{0};     // where what is left of it begins; or kTaken, by the thread that is at it
  std::atomic<bool> wanted{false};  // by another thread, which will finish it
};

// Each thread begins with its own share of the strands, the same part of the whole in every pass, whose data its caches
// may still hold; PyTorch's own loops are shared out in the same way. It runs a part of each in turn, so that there are
// several to take from it as long as it has much left to do. Then it goes through what others have left. Whoever comes
// last finds nothing, so that it does not matter how many come. In the end a thread that finds nothing free is faster
// than those that are still at work, and takes a strand over from one of them, which leaves.
struct Task {
  void (*body)(int64_t strand, int64_t begin, int64_t end, void* context);
  void* context;
  int64_t count, length, part;  // strands, indices in each, indices that are run at once
  int64_t workers;
  std::unique_ptr<Strand[]> strands;
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  bool is_finished(int64_t i) const {
    const int64_t next = strands[i].next.load(std::memory_order_relaxed);
    return next >= length && next != kTaken;
  }
};

// Runs the next part of a strand; returns whether there was one and nobody else was at it.
bool run_part(Task& task, int64_t i) {
  std::atomic<int64_t>& next = task.strands[i].next;
  int64_t begin = next.load(std::memory_order_relaxed);
  if (begin >= task.length) return false;
  if (!next.compare_exchange_strong(begin, kTaken, std::memory_order_acquire, std::memory_order_relaxed)) return false;
  const int64_t left = task.length - begin;
  try {
    task.body(i, begin, begin + (left < task.part ? left : task.part), task.context);
  } catch (...) {  // must not leave a thread of a pool
    if (!task.failed.exchange(true)) task.error = std::current_exception();
  }
  next.store(begin + task.part, std::memory_order_release);
  return true;
}

// Finishes a strand that another thread is at, unless somebody does that already.
void take_over(Task& task, int64_t i) {
  if (task.is_finished(i) || task.strands[i].wanted.exchange(true)) return;
  while (!task.is_finished(i))
    if (!run_part(task, i)) std::this_thread::yield();
}

void work(Task& task, int64_t worker) noexcept {
  const auto first_of = [&](int64_t owner) {
    return task.count / task.workers * owner + task.count % task.workers * owner / task.workers;
  };
  for (int64_t other = 0; other < task.workers; ++other) {
    const int64_t owner = (worker + other) % task.workers;
    for (bool found = true; found;) {
      found = false;
      for (int64_t i = first_of(owner); i < first_of(owner + 1); ++i) {
        if (!run_part(task, i)) continue;
        if (task.strands[i].wanted.load(std::memory_order_relaxed)) return;
        found = true;
      }
    }
  }
  if (task.part >= task.length) return;  // there is nothing to be had of a strand that is taken
  for (int64_t i = 0; i < task.count; ++i) take_over(task, i);
}

void work_on_own_threads(Task& task) {
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<size_t>(task.workers - 1));
    for (int64_t worker = 1; worker < task.workers; ++worker) others.emplace_back(work, std::ref(task), worker);
  } catch (const std::exception&) {  // the system gives no more: those that have started will do
  }
  work(task, 0);
  for (std::thread& other : others) other.join();
}

void work_in_pool(Task& task, bl_parallel_for parallel_for) {
  const auto take_part = [](int64_t begin, int64_t end, void* context) {
    for (int64_t worker = begin; worker < end; ++worker) work(*static_cast<Task*>(context), worker);
  };
  parallel_for(0, task.workers, 1, take_part, &task);
  work(task, 0);  // does nothing, unless the pool reported an error
}

}  // namespace

bl_threads threads_for(const bl_threads& threads, int64_t work, int64_t least) {
  return {work < least ? 1 : threads.count, threads.parallel_for};
}

void run_strands(const bl_threads& threads, int64_t count, int64_t length, int64_t part,
                 void (*body)(int64_t strand, int64_t begin, int64_t end, void* context), void* context) {
  if (count <= 0 || length <= 0) return;
  const int64_t workers = count < threads.count ? count : threads.count;
  Task task{body, context, count, length, part, workers, nullptr};
  if (workers > 1) task.strands.reset(new (std::nothrow) Strand[count]);
  if (!task.strands) {
    for (int64_t i = 0; i < count; ++i) body(i, 0, length, context);
  } else if (threads.parallel_for) {
    work_in_pool(task, threads.parallel_for);
  } else {
    work_on_own_threads(task);
  }
  if (task.error) std::rethrow_exception(task.error);
}

int64_t part_of(const bl_threads& threads, int64_t count) {
  const int64_t parts = threads.count > 1 ? kPartsPerThread * threads.count : 1;
  return count > parts ? (count - 1) / parts + 1 : 1;
}

}  // namespace blobloss
