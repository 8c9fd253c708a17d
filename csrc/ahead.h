// What comes next, brought into the cache while this block is computed: a few lines between one group of voxels and the
// next, because a processor that is asked for many lines at once waits for them. Otherwise the time for reading and the
// time for computing would add up.
#pragma once

#include "blobloss.h"
#include "vector_math.h"

namespace blobloss {
namespace BLOBLOSS_ISA {

class Ahead {
 public:
  // The voxels of a volume from `start` on.
  void add(const bl_volume& volume, int64_t b, int64_t c, int64_t start) {
    if (volume.data) add(volume.data, volume.type, b * volume.batch_stride + c * volume.channel_stride + start);
  }
  void add(const void* data, int32_t type, int64_t offset) {
    constexpr uintptr_t kBytes[] = {2, 2, 4, 8, 1, 1, 1, 2, 4, 8};  // in the order of bl_type
    const uintptr_t first = reinterpret_cast<uintptr_t>(data);
    streams_[size_++] = {first + static_cast<uintptr_t>(offset) * kBytes[type], kBytes[type]};
  }
  // The line in which voxel i of each lies, or would lie: there is no harm in an address of nothing. If i goes up in steps
  // of 16, that is every line; of voxels of 8 bytes every other line, and many processors fetch the next one with it.
  BL_INLINE_MEMBER void fetch(int i) const {
    for (int32_t s = 0; s < size_; ++s) {
      const uintptr_t address = streams_[s].address + static_cast<uintptr_t>(i) * streams_[s].bytes;
      __builtin_prefetch(reinterpret_cast<const void*>(address));
    }
  }

 private:
  struct Stream {
    uintptr_t address;
    uintptr_t bytes;  // of a voxel
  };
  Stream streams_[4] = {};  // logits, cells, target, gradient
  int32_t size_ = 0;
};

}  // namespace BLOBLOSS_ISA
}  // namespace blobloss
