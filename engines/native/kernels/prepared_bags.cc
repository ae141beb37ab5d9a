// prepared_bags.cc: blocks of bags, and ids to rows; pooling itself is a kernel path's.
//
// In a block the ids are turned into row pointers, one Chunk ahead of the pooling, so that a path
// can prefetch rows of the bags to come.
#include "kernels/prepared_bags.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "kernels/prefetch.h"

namespace dlrm_deploy {
namespace {

// Row bytes of one block: long enough (5 to 20 us) to hide handing it out, short enough to balance.
constexpr int64_t kBlockBytes = 64 * 1024;
// A block covers several slots only while it still has this many samples of each.
constexpr int64_t kSamplesPerSlot = 16;
constexpr int64_t kOffsetsPerBlock = 32 * 1024;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

std::string Text(int64_t value) { return std::to_string(value); }

int64_t DivideUp(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// How many pieces of `bytes` make a block, from 1 to `most`.
int64_t PiecesPerBlock(double bytes, int64_t most) {
  const double count = static_cast<double>(kBlockBytes) / bytes;
  return count >= static_cast<double>(most) ? most
                                            : std::max<int64_t>(1, static_cast<int64_t>(count));
}

void LowerTo(std::atomic<int64_t>& lowest, int64_t value) {
  int64_t seen = lowest.load(std::memory_order_relaxed);
  while (value < seen && !lowest.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

// The remainder of a floored division by n >= 1: in [0, n) for negative ids too.
int64_t Modulo(int64_t id, int64_t n) {
  const int64_t remainder = id % n;
  return remainder < 0 ? remainder + n : remainder;
}

// How a valid id becomes a row: the operator's attribute `divisions`.
enum class Division : int64_t { kExact = 0, kFloat = 1, kReciprocal = 2 };

// What is known of a slot before any id.
template <typename Id>
struct Slot {
  const char* table;  // the slot's first row
  int64_t row_bytes;
  int64_t rows;
  int64_t ids;
  const Id* offsets;  // of the feature's bag of sample 0; null in the fixed form:
  int64_t position;   // of the feature's first id
  int64_t factor;     // ids of each bag
  RowFormat format;
  bool plain;  // an id is the number of its row
  bool mean;
  Division division;
  int64_t modulus;
  int64_t divisor;
  float float_divisor;
  float reciprocal;

  // Where the bag of sample b begins in `indices`; it ends where that of b + 1 begins.
  int64_t Begin(int64_t b) const { return offsets != nullptr ? offsets[b] : position + b * factor; }

  // The row of a valid id, in [0, rows).
  int64_t RowOf(int64_t id) const {
    if (plain) return id;
    if (division == Division::kExact) return id / divisor % rows;
    const float rounded = static_cast<float>(id);
    const float quotient =
        division == Division::kFloat ? rounded / float_divisor : rounded * reciprocal;
    return std::min(static_cast<int64_t>(quotient), rows - 1);
  }
};

// For one type of ids.
template <typename Id>
class PreparedBagsOf : public PreparedBags {
 public:
  PreparedBagsOf(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs, int64_t batch,
                 const KernelPath& path)
      : PreparedBags(batch, bag.slots(), inputs.width),
        bag_(bag),
        attributes_(bag.attributes()),
        in_(inputs),
        ids_(static_cast<const Id*>(inputs.indices)),
        offsets_(static_cast<const Id*>(inputs.offsets)),
        path_(path) {
    slot_.reserve(attributes_.features.size());
    double bytes_per_row = 0.0;
    for (size_t t = 0; t < attributes_.features.size(); ++t) {
      slot_.push_back(MakeSlot(t));
      bytes_per_row += static_cast<double>(slot_.back().row_bytes) / static_cast<double>(slots_);
    }
    const double bags = static_cast<double>(attributes_.num_features) *
                        static_cast<double>(std::max<int64_t>(batch, 1));
    const double ids_per_bag = std::max(1.0, static_cast<double>(in_.num_indices) / bags);
    sample_bytes_ = ids_per_bag * bytes_per_row * static_cast<double>(slots_);
  }

  // Offsets rise from 0 to N. After this every bag lies inside `indices`.
  Error CheckOffsets(const BlockRunner& runner) const {
    if (attributes_.Fixed()) return {};
    const int64_t bags = in_.num_offsets - 1;
    if (offsets_[0] != 0) {
      return "offsets must begin with 0, got " + Text(offsets_[0]);
    }
    std::atomic<int64_t> first_fall{kNone};
    auto check = [&](size_t index) {
      const int64_t begin = static_cast<int64_t>(index) * kOffsetsPerBlock;
      const int64_t end = std::min(bags, begin + kOffsetsPerBlock);
      bool falls = false;
      for (int64_t s = begin; s < end; ++s) falls |= offsets_[s + 1] < offsets_[s];
      for (int64_t s = begin; falls && s < end; ++s) {
        if (offsets_[s + 1] < offsets_[s]) {
          LowerTo(first_fall, s);
          break;
        }
      }
    };
    runner.ForEachBlock(static_cast<size_t>(DivideUp(bags, kOffsetsPerBlock)), check);
    const int64_t fall = first_fall.load();
    if (fall != kNone) {
      return "offsets must not fall: offsets[" + Text(fall + 1) + "] is " +
             Text(offsets_[fall + 1]) + " after " + Text(offsets_[fall]) + " (" +
             bag_.FeatureName(fall / batch_) + ", sample " + Text(fall % batch_) + ")";
    }
    if (offsets_[bags] != in_.num_indices) {
      return "offsets must end with the number of ids, " + Text(in_.num_indices) + ", got " +
             Text(offsets_[bags]);
    }
    return {};
  }

  void Pool(int64_t t0, int64_t t1, int64_t b0, int64_t b1, float* pooled) override {
    if (t0 >= t1 || b0 >= b1) return;
    Chunk chunks[2];
    Cursor cursor{t0, b0, slot_[static_cast<size_t>(t0)].Begin(b0)};
    const Block block{t1, b0, b1, pooled};
    Chunk* now = &chunks[0];
    Chunk* next = &chunks[1];
    Fill(cursor, block, now);
    PrefetchFirst(*now);
    while (now->bags > 0) {
      Fill(cursor, block, next);
      int ahead = std::min(next->rows, Chunk::kAhead);
      if (next->format != now->format) {  // rows of another size: a path could not tell
        PrefetchFirst(*next);
        ahead = 0;
      }
      std::copy_n(next->row, ahead, now->row + now->rows);
      std::fill_n(now->row + now->rows + ahead, Chunk::kAhead - ahead, nullptr);
      path_.pool_chunk(*now, width_);
      std::swap(now, next);
    }
  }

  Error BadId() const override {
    const int64_t bad = first_bad_id_.load();
    if (bad != kNone) return DescribeBadId(bad);
    return {};
  }

 private:
  // Where a block stands: the next id to look at is `position`, in the bag of slot t, sample b.
  struct Cursor {
    int64_t t, b, position;
  };

  // Samples [b0, b1) of the slots up to t1.
  struct Block {
    int64_t t1, b0, b1;
    float* pooled;  // of sample b0
  };

  Slot<Id> MakeSlot(size_t t) const {
    const EmbeddingBagAttributes& a = attributes_;
    const size_t feature = static_cast<size_t>(a.features[t]);
    Slot<Id> slot;
    slot.format = bag_.format(t);
    slot.row_bytes = RowBytes(slot.format, width_);
    slot.table =
        static_cast<const char*>(in_.matrix(slot.format).data) + a.row_starts[t] * slot.row_bytes;
    slot.rows = a.rows[t];
    slot.ids = a.ids[t];
    slot.modulus = a.moduli[t];
    slot.divisor = a.divisors[t];
    slot.float_divisor = static_cast<float>(slot.divisor);
    slot.reciprocal = 1.0f / slot.float_divisor;
    slot.division = static_cast<Division>(a.divisions[t]);
    slot.plain = slot.ids == slot.rows && slot.modulus == 0 && slot.divisor == 1 &&
                 slot.division == Division::kExact;
    slot.mean = a.mean[t] == 1;
    slot.offsets = a.Fixed() ? nullptr : offsets_ + a.features[t] * batch_;
    slot.position = a.Fixed() ? batch_ * bag_.PoolingFactorStart(feature) : 0;
    slot.factor = a.Fixed() ? a.pooling_factors[feature] : 0;
    return slot;
  }

  // Rows that the chunk before cannot ask for.
  void PrefetchFirst(const Chunk& chunk) const {
    const int64_t bytes = RowBytes(chunk.format, width_);
    for (int i = 0; i < std::min(chunk.rows, Chunk::kAhead); ++i) PrefetchRow(chunk.row[i], bytes);
  }

  // Takes the next bags, or parts of them, from the cursor on, up to a slot of another format. An
  // empty chunk: the block is done.
  void Fill(Cursor& cursor, const Block& block, Chunk* chunk) {
    chunk->rows = 0;
    chunk->bags = 0;
    chunk->weighted = in_.has_per_sample_weights;
    chunk->one_hot = true;
    if (cursor.t < block.t1) chunk->format = slot_[static_cast<size_t>(cursor.t)].format;
    while (cursor.t < block.t1 && chunk->rows < Chunk::kRows && chunk->bags < Chunk::kBags) {
      const Slot<Id>& slot = slot_[static_cast<size_t>(cursor.t)];
      if (slot.format != chunk->format) break;
      FillFrom(slot, cursor, block, chunk);
      if (cursor.b == block.b1) {
        ++cursor.t;
        cursor.b = block.b0;
        if (cursor.t < block.t1) {
          cursor.position = slot_[static_cast<size_t>(cursor.t)].Begin(block.b0);
        }
      }
    }
  }

  // The ids of one slot's samples lie one after the other: first the bags, then all their ids.
  void FillFrom(const Slot<Id>& slot, Cursor& cursor, const Block& block, Chunk* chunk) {
    if (slot.offsets == nullptr && slot.factor == 1) return FillOneHot(slot, cursor, block, chunk);
    const int64_t first = cursor.position;
    const int64_t stride = slots_ * width_;
    float* out = block.pooled + (cursor.b - block.b0) * stride + cursor.t * width_;
    int64_t b = cursor.b;
    int64_t begin = slot.Begin(b);
    int64_t position = first;
    int64_t room = Chunk::kRows - chunk->rows;
    int bags = chunk->bags;
    bool one_hot = chunk->one_hot;
    while (b < block.b1 && bags < Chunk::kBags) {
      const int64_t end = slot.Begin(b + 1);
      const int64_t left = end - position;
      if (room == 0 && left > 0) break;
      const int64_t count = std::min(room, left);
      BagPart& part = chunk->bag[bags++];
      part.out = out;
      part.divisor =
          slot.mean && count == left && end > begin ? static_cast<float>(end - begin) : 1.0f;
      part.count = static_cast<uint16_t>(count);
      part.resume = position > begin;
      one_hot &= left == 1 && position == begin;
      position += count;
      room -= count;
      if (count < left) break;
      begin = end;
      out += stride;
      ++b;
    }
    chunk->bags = bags;
    chunk->one_hot = one_hot;
    cursor.b = b;
    cursor.position = position;
    Resolve(slot, first, position, chunk);
  }

  // The same where every bag is known to have one id, in half of the time.
  void FillOneHot(const Slot<Id>& slot, Cursor& cursor, const Block& block, Chunk* chunk) {
    const int64_t stride = slots_ * width_;
    const int64_t room = std::min<int64_t>(Chunk::kRows - chunk->rows, Chunk::kBags - chunk->bags);
    const int64_t count = std::min(room, block.b1 - cursor.b);
    float* out = block.pooled + (cursor.b - block.b0) * stride + cursor.t * width_;
    BagPart* const parts = chunk->bag + chunk->bags;
    for (int64_t i = 0; i < count; ++i, out += stride) parts[i] = {out, 1.0f, 1, false};
    chunk->bags += static_cast<int>(count);
    Resolve(slot, cursor.position, cursor.position + count, chunk);
    cursor.b += count;
    cursor.position += count;
  }

  void Resolve(const Slot<Id>& slot, int64_t first, int64_t last, Chunk* chunk) {
    switch (attributes_.index_policy) {
      case IndexPolicy::kError:
        return ResolveAs<IndexPolicy::kError>(slot, first, last, chunk);
      case IndexPolicy::kClamp:
        return ResolveAs<IndexPolicy::kClamp>(slot, first, last, chunk);
      case IndexPolicy::kModulo:
        return ResolveAs<IndexPolicy::kModulo>(slot, first, last, chunk);
      case IndexPolicy::kZero:
        return ResolveAs<IndexPolicy::kZero>(slot, first, last, chunk);
    }
  }

  // Appends the rows of ids [first, last) to the chunk: checked, so that they lie inside the slot.
  template <IndexPolicy policy>
  void ResolveAs(const Slot<Id>& slot, int64_t first, int64_t last, Chunk* chunk) {
    const void** out = chunk->row + chunk->rows;
    if (slot.plain) {
      const char* const table = slot.table;
      const int64_t rows = slot.rows;
      const int64_t row_bytes = slot.row_bytes;
      for (int64_t p = first; p < last; ++p) {
        int64_t id = ids_[p];
        *out++ = ValidId<policy>(rows, p, &id) ? table + id * row_bytes : nullptr;
      }
    } else {
      for (int64_t p = first; p < last; ++p) {
        int64_t id = ids_[p];
        if (slot.modulus > 0) id = Modulo(id, slot.modulus);
        *out++ = ValidId<policy>(slot.ids, p, &id) ? slot.table + slot.RowOf(id) * slot.row_bytes
                                                   : nullptr;
      }
    }
    if (chunk->weighted) {
      std::copy(in_.per_sample_weights + first, in_.per_sample_weights + last,
                chunk->weight + chunk->rows);
    }
    chunk->rows += static_cast<int>(last - first);
  }

  // Follows the index policy for the id at position p: whether a row is read, and for which id,
  // which is then in [0, limit).
  template <IndexPolicy policy>
  bool ValidId(int64_t limit, int64_t p, int64_t* id) {
    if (static_cast<uint64_t>(*id) < static_cast<uint64_t>(limit)) return true;
    if constexpr (policy == IndexPolicy::kError) LowerTo(first_bad_id_, p);
    if constexpr (policy == IndexPolicy::kClamp) *id = *id < 0 ? 0 : limit - 1;
    if constexpr (policy == IndexPolicy::kModulo) *id = Modulo(*id, limit);
    return policy == IndexPolicy::kClamp || policy == IndexPolicy::kModulo;
  }

  // Of several slots that refuse the id, the one with the fewest ids is quoted.
  std::string DescribeBadId(int64_t position) const {
    const Slot<Id>* refusing = nullptr;
    int64_t feature = 0;
    for (size_t t = 0; t < slot_.size(); ++t) {
      const Slot<Id>& slot = slot_[t];
      if (position < slot.Begin(0) || position >= slot.Begin(batch_)) continue;
      int64_t id = ids_[position];
      if (slot.modulus > 0) id = Modulo(id, slot.modulus);
      if (id >= 0 && id < slot.ids) continue;
      if (refusing == nullptr || slot.ids < refusing->ids) {
        refusing = &slot;
        feature = attributes_.features[t];
      }
    }
    int64_t sample = 0;  // bags of a feature lie in order: halve the range that holds the position
    for (int64_t high = batch_ - 1; sample < high;) {
      const int64_t middle = sample + (high - sample) / 2;
      if (position < refusing->Begin(middle + 1)) {
        high = middle;
      } else {
        sample = middle + 1;
      }
    }
    return bag_.FeatureName(feature) + ", sample " + Text(sample) + ", position " +
           Text(position - refusing->Begin(sample)) + " of its bag: id " + Text(ids_[position]) +
           " is outside [0, " + Text(refusing->ids) +
           "). Hash ids to the table size before scoring, or choose the index policy clamp, "
           "modulo or zero.";
  }

  const EmbeddingBag& bag_;
  const EmbeddingBagAttributes& attributes_;
  const EmbeddingBagInputs& in_;
  const Id* ids_;
  const Id* offsets_;
  const KernelPath& path_;
  std::vector<Slot<Id>> slot_;  // [T]
  std::atomic<int64_t> first_bad_id_{kNone};
};

template <typename Id>
Error PrepareAs(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs, int64_t batch,
                const KernelPath& path, const BlockRunner& runner,
                std::unique_ptr<PreparedBags>* made) {
  auto bags = std::make_unique<PreparedBagsOf<Id>>(bag, inputs, batch, path);
  if (Error error = bags->CheckOffsets(runner)) return error;
  *made = std::move(bags);
  return {};
}

}  // namespace

void PreparedBags::PoolTogether(const BlockRunner& runner, int64_t b0, int64_t b1, float* pooled) {
  if (b0 >= b1) return;
  const int64_t samples = b1 - b0;
  const double bag_bytes = sample_bytes_ / static_cast<double>(slots_);
  // Few samples: a block takes more slots instead.
  const int64_t samples_of_slot = std::min(samples, kSamplesPerSlot);
  const int64_t slots_per_block =
      PiecesPerBlock(bag_bytes * static_cast<double>(samples_of_slot), slots_);
  const int64_t samples_per_block =
      PiecesPerBlock(bag_bytes * static_cast<double>(slots_per_block), samples);
  const int64_t sample_blocks = DivideUp(samples, samples_per_block);
  // In order, whichever thread asks: a runner may give each thread a range of its own.
  std::atomic<int64_t> next{0};
  auto pool = [&](size_t) {
    const int64_t block = next.fetch_add(1, std::memory_order_relaxed);
    const int64_t t = block / sample_blocks * slots_per_block;
    const int64_t b = block % sample_blocks * samples_per_block;
    Pool(t, std::min(slots_, t + slots_per_block), b0 + b,
         b0 + std::min(samples, b + samples_per_block), pooled + b * slots_ * width_);
  };
  runner.ForEachBlock(static_cast<size_t>(sample_blocks * DivideUp(slots_, slots_per_block)), pool);
}

Error PreparedBags::Prepare(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs,
                            int64_t batch, const KernelPath& path, const BlockRunner& runner,
                            std::unique_ptr<PreparedBags>* made) {
  return inputs.id_type == IdType::kInt32
             ? PrepareAs<int32_t>(bag, inputs, batch, path, runner, made)
             : PrepareAs<int64_t>(bag, inputs, batch, path, runner, made);
}

}  // namespace dlrm_deploy
