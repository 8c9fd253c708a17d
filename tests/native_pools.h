// Stand-ins for PyTorch's pool, which the drivers native_*stress.cpp hand to the library.
#pragma once

#include <stdint.h>

#include <thread>
#include <vector>

#include "blobloss.h"

namespace {

// Its threads come and go, and it begins at the end.
inline int32_t fake_pool(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = end; i-- > begin;) threads.emplace_back(body, i, i + 1, context);
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// It has no threads.
inline int32_t patient_pool(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = end; i-- > begin;) body(i, i + 1, context);
  return 0;
}

inline int32_t refusing_pool(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*) { return 1; }

}  // namespace
