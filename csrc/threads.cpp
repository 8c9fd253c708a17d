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

constexpr int64_t kRangesPerThread = 4;  // so that a thread that is held up leaves its share to the others

// The indices that are one thread's, unless others take them because they have none left.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Each thread begins with its own share, the same part of the whole in every pass, whose data its caches may still hold;
// PyTorch's own loops are shared out in the same way. Then it takes ranges of what others have left. Whoever comes last
// finds nothing, so that it does not matter how many come.
struct Task {
  void (*body)(int64_t begin, int64_t end, void* context);
  void* context;
  int64_t range;
  int64_t workers;
  std::unique_ptr<Share[]> shares;  // of the workers
  std::atomic<bool> failed{false};
  std::exception_ptr error{};
};

void work(Task& task, int64_t worker) noexcept {
  for (int64_t other = 0; other < task.workers; ++other) {
    Share& share = task.shares[(worker + other) % task.workers];
    while (share.next.load(std::memory_order_relaxed) < share.end) {
      const int64_t begin = share.next.fetch_add(task.range, std::memory_order_relaxed), left = share.end - begin;
      if (left <= 0) break;
      try {
        task.body(begin, begin + (left < task.range ? left : task.range), task.context);
      } catch (...) {  // must not leave a thread of a pool
        if (!task.failed.exchange(true)) task.error = std::current_exception();
      }
    }
  }
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

void run_parallel(const bl_threads& threads, int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                  void* context) {
  if (count <= 0) return;
  if (count == 1 || threads.count <= 1) return body(0, count, context);
  const int64_t range = (count - 1) / (kRangesPerThread * threads.count) + 1;
  const int64_t ranges = (count - 1) / range + 1, workers = ranges < threads.count ? ranges : threads.count;
  Task task{body, context, range, workers, std::unique_ptr<Share[]>(new (std::nothrow) Share[workers])};
  if (!task.shares) return body(0, count, context);
  for (int64_t worker = 0; worker < workers; ++worker) {
    Share& share = task.shares[worker];
    share.next = count / workers * worker + count % workers * worker / workers;
    share.end = count / workers * (worker + 1) + count % workers * (worker + 1) / workers;
  }
  if (threads.parallel_for)
    work_in_pool(task, threads.parallel_for);
  else
    work_on_own_threads(task);
  if (task.error) std::rethrow_exception(task.error);
}

}  // namespace blobloss
