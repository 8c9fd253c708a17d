// Keys of sixteen voxels side by side, which the passes of nearest_lines.cpp work on together.
#pragma once

#include <stdint.h>
#include <string.h>

#include "nearest_lines.h"

#ifndef BLOBLOSS_ISA
#define BLOBLOSS_ISA baseline
#endif

namespace blobloss {
namespace BLOBLOSS_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Halves of halves rather than an array, which compilers do not keep in registers.
template <typename T, int N, bool kFits = N * sizeof(T) == kVectorBytes>
struct Lanes {
  Lanes<T, N / 2> low, high;

  void load(const T* from) {
    low.load(from);
    high.load(from + N / 2);
  }
  void store(T* to) const {
    low.store(to);
    high.store(to + N / 2);
  }
  void fill(T x) {
    low.fill(x);
    high.fill(x);
  }
  void add(T x) {
    low.add(x);
    high.add(x);
  }
  void take_smaller(const Lanes& other) {
    low.take_smaller(other.low);
    high.take_smaller(other.high);
  }
  // And note where it came from.
  void take_smaller(const Lanes& other, Lanes& place, T here) {
    low.take_smaller(other.low, place.low, here);
    high.take_smaller(other.high, place.high, here);
  }
  // Of pairs, of which these are in front.
  void take_smaller(Lanes& second, const Lanes& other, const Lanes& other_second) {
    low.take_smaller(second.low, other.low, other_second.low);
    high.take_smaller(second.high, other.high, other_second.high);
  }
  void take_smaller(Lanes& second, const Lanes& other, const Lanes& other_second, Lanes& place, T here) {
    low.take_smaller(second.low, other.low, other_second.low, place.low, here);
    high.take_smaller(second.high, other.high, other_second.high, place.high, here);
  }
};

template <typename T, int N>
struct Lanes<T, N, true> {
  typedef T V __attribute__((vector_size(kVectorBytes)));
  V v;

  void load(const T* from) { memcpy(&v, from, sizeof v); }
  void store(T* to) const { memcpy(to, &v, sizeof v); }
  void fill(T x) { v = V{} + x; }
  void add(T x) { v += x; }
  void take_smaller(const Lanes& other) { v = other.v < v ? other.v : v; }
  void take_smaller(const Lanes& other, Lanes& place, T here) {
    const auto is_smaller = other.v < v;
    v = is_smaller ? other.v : v;
    place.v = is_smaller ? V{} + here : place.v;
  }
  void take_smaller(Lanes& second, const Lanes& other, const Lanes& other_second) {
    const auto is_smaller = (other.v < v) | ((other.v == v) & (other_second.v < second.v));
    v = is_smaller ? other.v : v;
    second.v = is_smaller ? other_second.v : second.v;
  }
  void take_smaller(Lanes& second, const Lanes& other, const Lanes& other_second, Lanes& place, T here) {
    const auto is_smaller = (other.v < v) | ((other.v == v) & (other_second.v < second.v));
    v = is_smaller ? other.v : v;
    second.v = is_smaller ? other_second.v : second.v;
    place.v = is_smaller ? V{} + here : place.v;
  }
};

inline bool operator<(const WideKey& a, const WideKey& b) {
  return a.distance < b.distance || (a.distance == b.distance && a.id < b.id);
}

// Distances and ids apart: sixteen of these lie in memory as sixteen distances, then sixteen ids.
template <int N>
struct WideLanes {
  Lanes<int64_t, N> distances, ids;

  void load(const WideKey* from) {
    distances.load(reinterpret_cast<const int64_t*>(from));
    ids.load(reinterpret_cast<const int64_t*>(from) + N);
  }
  void store(WideKey* to) const {
    distances.store(reinterpret_cast<int64_t*>(to));
    ids.store(reinterpret_cast<int64_t*>(to) + N);
  }
  void add(int64_t x) { distances.add(x); }
  void take_smaller(const WideLanes& other) { distances.take_smaller(ids, other.distances, other.ids); }
  void take_smaller(const WideLanes& other, Lanes<int64_t, N>& place, int64_t here) {
    distances.take_smaller(ids, other.distances, other.ids, place, here);
  }
};

// A kind of key: what is added to it, how it is made from an id and read, and where a block of sixteen has it.
struct Key32 {
  typedef int32_t Key;
  typedef int32_t Step;
  typedef Lanes<int32_t, kLanes> Block;
  static Key of(int32_t id) { return id; }
  static Key get(const Key* block, int64_t lane) { return block[lane]; }
  static void put(Key key, Key* block, int64_t lane) { block[lane] = key; }
  static Key plus(Key key, Step step) { return key + step; }
  static int32_t id(Key key, int32_t id_bits) {
    return static_cast<int32_t>(static_cast<uint32_t>(key) & ((1u << id_bits) - 1));
  }
};

struct Key64 {
  typedef int64_t Key;
  typedef int64_t Step;
  typedef Lanes<int64_t, kLanes> Block;
  static Key of(int32_t id) { return id; }
  static Key get(const Key* block, int64_t lane) { return block[lane]; }
  static void put(Key key, Key* block, int64_t lane) { block[lane] = key; }
  static Key plus(Key key, Step step) { return key + step; }
  static int32_t id(Key key, int32_t id_bits) {
    return static_cast<int32_t>(static_cast<uint64_t>(key) & ((uint64_t(1) << id_bits) - 1));
  }
};

struct KeyWide {
  typedef WideKey Key;
  typedef int64_t Step;
  typedef WideLanes<kLanes> Block;
  static Key of(int32_t id) { return {0, id}; }
  static Key get(const Key* block, int64_t lane) {
    const int64_t* const numbers = reinterpret_cast<const int64_t*>(block);
    return {numbers[lane], numbers[kLanes + lane]};
  }
  static void put(Key key, Key* block, int64_t lane) {
    int64_t* const numbers = reinterpret_cast<int64_t*>(block);
    numbers[lane] = key.distance;
    numbers[kLanes + lane] = key.id;
  }
  static Key plus(Key key, Step step) { return {key.distance + step, key.id}; }
  static int32_t id(Key key, int32_t) { return static_cast<int32_t>(key.id); }
};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
