// Running the parts of a task on several threads.
#pragma once

#include <stdint.h>

#include "blobloss.h"

namespace blobloss {

// `threads`, or one alone for less than `least` work: then waking others up would cost more than they save.
bl_threads threads_for(const bl_threads& threads, int64_t work, int64_t least);

// Calls body(strand, begin, end, context) so that in each of `count` strands every index of [0, length) is covered
// once: in order, never two parts of a strand at a time, and each sees what those before it wrote. On as many threads
// as `threads` allows, at most one for every strand; with several, a call covers at most `part` (> 0) indices. Which
// thread runs which part is not fixed: what body computes must not depend on it. What body throws is thrown here, when
// all threads are done; whether other parts still run is not said.
void run_strands(const bl_threads& threads, int64_t count, int64_t length, int64_t part,
                 void (*body)(int64_t strand, int64_t begin, int64_t end, void* context), void* context);

template <typename Body>
void run_strands(const bl_threads& threads, int64_t count, int64_t length, int64_t part, const Body& body) {
  run_strands(
      threads, count, length, part,
      [](int64_t strand, int64_t begin, int64_t end, void* context) {
        (*static_cast<const Body*>(context))(strand, begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// How many of `count` indices, those of all strands, make a part: few enough to share out; all, for one thread.
int64_t part_of(const bl_threads& threads, int64_t count);

// Calls body(begin, end) so that every index of [0, count) is covered exactly once; otherwise like run_strands.
template <typename Body>
void run_parallel(const bl_threads& threads, int64_t count, const Body& body) {
  const int64_t part = part_of(threads, count);
  run_strands(threads, (count + part - 1) / part, 1, 1, [&](int64_t i, int64_t, int64_t) {
    body(i * part, count - i * part < part ? count : (i + 1) * part);
  });
}

}  // namespace blobloss
