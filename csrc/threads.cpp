// No pool of its own, so that a forked child starts from nothing and unloading leaves no thread behind.

#include "threads.h"

#include <atomic>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

namespace blobloss {
namespace {

constexpr int64_t kRangesPerThread = 4;  // so that a thread that is held up leaves its share to the others

// Threads take range after range. Whoever comes last finds nothing, so that it does not matter how many come.
struct Task {
  void (*body)(int64_t begin, int64_t end, void* context);
  void* context;
  int64_t count;
  int64_t range;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};
};

void work(Task& task) noexcept {
  for (;;) {
    const int64_t begin = task.next.fetch_add(task.range, std::memory_order_relaxed);
    if (begin >= task.count) return;
    const int64_t left = task.count - begin;
    try {
      task.body(begin, begin + (left < task.range ? left : task.range), task.context);
    } catch (...) {  // must not leave a thread of a pool
      if (!task.failed.exchange(true)) task.error = std::current_exception();
    }
  }
}

void work_on_own_threads(Task& task, int64_t count) {
  std::vector<std::thread> others;
  try {
    others.reserve(static_cast<size_t>(count - 1));
    for (int64_t i = 1; i < count; ++i) others.emplace_back(work, std::ref(task));
  } catch (const std::exception&) {  // the system gives no more: those that have started will do
  }
  work(task);
  for (std::thread& other : others) other.join();
}

void work_in_pool(Task& task, int64_t count, bl_parallel_for parallel_for) {
  const auto take_part = [](int64_t begin, int64_t end, void* context) {
    for (int64_t i = begin; i < end; ++i) work(*static_cast<Task*>(context));
  };
  parallel_for(0, count, 1, take_part, &task);
  work(task);  // does nothing, unless the pool reported an error
}

}  // namespace

void run_parallel(const bl_threads& threads, int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                  void* context) {
  if (count <= 0) return;
  if (count == 1 || threads.count <= 1) return body(0, count, context);
  const int64_t range = (count - 1) / (kRangesPerThread * threads.count) + 1;
  const int64_t ranges = (count - 1) / range + 1;
  Task task{body, context, count, range};
  const int64_t workers = ranges < threads.count ? ranges : threads.count;
  if (threads.parallel_for)
    work_in_pool(task, workers, threads.parallel_for);
  else
    work_on_own_threads(task, workers);
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace blobloss
