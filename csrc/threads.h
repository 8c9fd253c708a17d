// Running the parts of a task on several threads.
#pragma once

#include <stdint.h>

#include "blobloss.h"

namespace blobloss {

// Calls body(begin, end, context) so that every index of [0, count) is covered exactly once, on as many threads as
// `threads` allows. Which thread runs which part is not fixed: what body computes for an index must not depend on it.
// What body throws is thrown here, when all threads are done.
void run_parallel(const bl_threads& threads, int64_t count, void (*body)(int64_t begin, int64_t end, void* context),
                  void* context);

template <typename Body>
void run_parallel(const bl_threads& threads, int64_t count, const Body& body) {
  run_parallel(
      threads, count,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace blobloss
