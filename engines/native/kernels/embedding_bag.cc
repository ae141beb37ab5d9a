// embedding_bag.cc: checks, blocks and ids to rows; pooling itself is a kernel path's.
//
// A block is some samples of some slots. Inside it the ids are turned into row pointers, one Chunk
// ahead of the pooling, so that a path can prefetch rows of the bags to come.
#include "kernels/embedding_bag.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <utility>

namespace dlrm_deploy {
namespace {

// Row bytes of one block: long enough (5 to 20 us) to hide handing it out, short enough to balance.
constexpr int64_t kBlockBytes = 64 * 1024;
// A block covers several slots only while it still has this many samples of each.
constexpr int64_t kSamplesPerSlot = 16;
constexpr int64_t kOffsetsPerBlock = 32 * 1024;
constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
// Valid ids are below this, so that they and their float32 neighbours fit in 64 bits.
constexpr int64_t kMostIds = int64_t{1} << 62;

std::string Text(int64_t value) { return std::to_string(value); }

void LowerTo(std::atomic<int64_t>& lowest, int64_t value) {
  int64_t seen = lowest.load(std::memory_order_relaxed);
  while (value < seen && !lowest.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

int64_t DivideUp(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// How ids of a slot become rows of its table part, unless an id is the number of its row.
enum class Division : int64_t { kExact = 0, kFloat = 1, kReciprocal = 2 };

// The remainder of a floored division by n >= 1: in [0, n) for negative ids too.
int64_t Modulo(int64_t id, int64_t n) {
  const int64_t remainder = id % n;
  return remainder < 0 ? remainder + n : remainder;
}

Error CheckLength(const char* attribute, size_t seen, int64_t expected, const char* of) {
  if (static_cast<int64_t>(seen) == expected) return {};
  return std::string("attribute ") + attribute + " has " + std::to_string(seen) +
         " values, expected one per " + of + ": " + Text(expected);
}

}  // namespace

Error ParseIndexPolicy(const std::string& name, IndexPolicy* policy) {
  constexpr std::pair<const char*, IndexPolicy> kPolicies[] = {{"error", IndexPolicy::kError},
                                                               {"clamp", IndexPolicy::kClamp},
                                                               {"modulo", IndexPolicy::kModulo},
                                                               {"zero", IndexPolicy::kZero}};
  for (const auto& [known, value] : kPolicies) {
    if (name == known) {
      *policy = value;
      return {};
    }
  }
  return "attribute index_policy is \"" + name + "\", expected error, clamp, modulo or zero";
}

Error EmbeddingBag::Create(EmbeddingBagAttributes attributes, EmbeddingBag* bag) {
  const int64_t slots = static_cast<int64_t>(attributes.features.size());
  if (attributes.ids.empty()) attributes.ids = attributes.rows;
  for (const auto& [values, otherwise] :
       {std::pair(&attributes.moduli, 0), {&attributes.divisors, 1}, {&attributes.divisions, 0}}) {
    if (values->empty()) values->assign(attributes.features.size(), otherwise);
  }
  const EmbeddingBagAttributes& a = attributes;
  if (a.num_features < 1) {
    return "attribute num_features is " + Text(a.num_features) + ", expected at least 1";
  }
  if (slots == 0) return "attribute features is empty, expected one feature per slot";
  for (const auto& [name, values] : {std::pair("row_starts", &a.row_starts),
                                     {"rows", &a.rows},
                                     {"ids", &a.ids},
                                     {"moduli", &a.moduli},
                                     {"divisors", &a.divisors},
                                     {"divisions", &a.divisions},
                                     {"mean", &a.mean}}) {
    if (Error error = CheckLength(name, values->size(), slots, "slot")) return error;
  }
  for (int64_t t = 0; t < slots; ++t) {
    const std::string slot = " of slot " + Text(t);
    if (a.features[t] < 0 || a.features[t] >= a.num_features) {
      return "feature " + Text(a.features[t]) + slot + " is outside [0, " + Text(a.num_features) +
             "), the features of the batch";
    }
    if (a.mean[t] != 0 && a.mean[t] != 1) {
      return "attribute mean" + slot + " is " + Text(a.mean[t]) + ", expected 0 or 1";
    }
    if (a.row_starts[t] < 0 || a.rows[t] < 1 || a.rows[t] > kNone - a.row_starts[t]) {
      return "the row range" + slot + " begins at " + Text(a.row_starts[t]) + " and has " +
             Text(a.rows[t]) + " rows, expected a start of at least 0 and at least one row";
    }
    if (a.ids[t] < 1 || a.ids[t] > kMostIds) {
      return "attribute ids" + slot + " is " + Text(a.ids[t]) + ", expected 1 to " + Text(kMostIds);
    }
    if (a.moduli[t] < 0) {
      return "attribute moduli" + slot + " is " + Text(a.moduli[t]) + ", expected at least 0";
    }
    if (a.divisors[t] < 1) {
      return "attribute divisors" + slot + " is " + Text(a.divisors[t]) + ", expected at least 1";
    }
    if (a.divisions[t] < 0 || a.divisions[t] > 2) {
      return "attribute divisions" + slot + " is " + Text(a.divisions[t]) + ", expected 0, 1 or 2";
    }
  }

  std::vector<int64_t> starts;
  if (a.Fixed()) {
    if (Error error =
            CheckLength("pooling_factors", a.pooling_factors.size(), a.num_features, "feature")) {
      return error;
    }
    int64_t sum = 0;
    starts.push_back(0);
    for (const int64_t factor : a.pooling_factors) {
      if (factor < 0 || factor > kNone - sum) {
        return "pooling factor " + Text(factor) + " is out of range";
      }
      sum += factor;
      starts.push_back(sum);
    }
    if (sum == 0) return "all pooling_factors are 0: they do not tell the batch size";
  }

  std::vector<std::string> names;
  if (!a.feature_names.empty()) {
    size_t begin = 0;
    for (size_t end = 0; end != std::string::npos; begin = end + 1) {
      end = a.feature_names.find('\n', begin);
      names.push_back(a.feature_names.substr(begin, end - begin));
    }
    if (Error error = CheckLength("feature_names", names.size(), a.num_features, "feature")) {
      return error;
    }
  }
  bag->attributes_ = std::move(attributes);
  bag->names_ = std::move(names);
  bag->pooling_factor_starts_ = std::move(starts);
  return {};
}

std::string EmbeddingBag::FeatureName(int64_t feature) const {
  if (names_.empty()) return "feature " + Text(feature);
  return "feature '" + names_[static_cast<size_t>(feature)] + "'";
}

Error EmbeddingBag::BatchSize(const EmbeddingBagInputs& in, int64_t* batch) const {
  const EmbeddingBagAttributes& a = attributes_;
  for (int64_t t = 0; t < slots(); ++t) {
    if (a.rows[t] > in.total_rows || a.row_starts[t] > in.total_rows - a.rows[t]) {
      return "slot " + Text(t) + " (" + FeatureName(a.features[t]) + ") reads rows [" +
             Text(a.row_starts[t]) + ", " + Text(a.row_starts[t] + a.rows[t]) +
             "), but weights has " + Text(in.total_rows) + " rows";
    }
  }
  if (in.has_per_sample_weights) {
    if (in.num_per_sample_weights != in.num_indices) {
      return "per_sample_weights has " + Text(in.num_per_sample_weights) +
             " values, expected one per id: " + Text(in.num_indices);
    }
    for (int64_t t = 0; t < slots(); ++t) {
      if (a.mean[t] == 1) {
        return "per_sample_weights go with sum pooling only, but slot " + Text(t) + " (" +
               FeatureName(a.features[t]) + ") takes the mean";
      }
    }
  }
  if (a.Fixed()) {
    if (in.has_offsets) {
      return std::string("both pooling_factors and offsets are given; leave one out");
    }
    const int64_t per_sample = pooling_factor_starts_.back();
    if (in.num_indices % per_sample != 0) {
      return "indices has " + Text(in.num_indices) +
             " ids, expected a multiple of the sum of pooling_factors, " + Text(per_sample);
    }
    *batch = in.num_indices / per_sample;
    return {};
  }
  if (!in.has_offsets) {
    return std::string("neither offsets nor pooling_factors are given; one of them must be");
  }
  if (in.num_offsets < 1 || (in.num_offsets - 1) % a.num_features != 0) {
    return "offsets has " + Text(in.num_offsets) +
           " values, expected num_features * batch + 1 with num_features = " + Text(a.num_features);
  }
  *batch = (in.num_offsets - 1) / a.num_features;
  return {};
}

// One call of EmbeddingBag::Run for one type of ids.
template <typename Id>
class EmbeddingBagRun {
 public:
  EmbeddingBagRun(const EmbeddingBag& bag, const EmbeddingBagInputs& inputs, int64_t batch,
                  const KernelPath& path, float* pooled)
      : bag_(bag),
        attributes_(bag.attributes_),
        in_(inputs),
        ids_(static_cast<const Id*>(inputs.indices)),
        offsets_(static_cast<const Id*>(inputs.offsets)),
        batch_(batch),
        slots_(bag.slots()),
        path_(path),
        pooled_(pooled) {}

  Error Run(const BlockRunner& runner) {
    if (Error error = CheckOffsets(runner)) return error;
    if (batch_ == 0) return {};
    ChooseBlocks();
    const int64_t slot_blocks = DivideUp(slots_, slots_per_block_);
    const int64_t blocks = DivideUp(batch_, samples_per_block_) * slot_blocks;
    auto pool = [&](size_t index) {
      const int64_t block = static_cast<int64_t>(index);
      const int64_t t = block % slot_blocks * slots_per_block_;
      const int64_t b = block / slot_blocks * samples_per_block_;
      PoolBlock(t, std::min(slots_, t + slots_per_block_), b,
                std::min(batch_, b + samples_per_block_));
    };
    runner.ForEachBlock(static_cast<size_t>(blocks), pool);
    const int64_t bad = first_bad_id_.load();
    if (bad != kNone) return DescribeBadId(bad);
    return {};
  }

 private:
  // Where a block stands: the next id to look at is `position`, in the bag of slot t, sample b.
  struct Cursor {
    int64_t t, b, position;
  };

  int64_t BagBegin(int64_t feature, int64_t sample) const {
    if (!attributes_.Fixed()) return offsets_[feature * batch_ + sample];
    return batch_ * bag_.pooling_factor_starts_[static_cast<size_t>(feature)] +
           sample * attributes_.pooling_factors[static_cast<size_t>(feature)];
  }
  int64_t BagEnd(int64_t feature, int64_t sample) const {
    if (!attributes_.Fixed()) return offsets_[feature * batch_ + sample + 1];
    return BagBegin(feature, sample) + attributes_.pooling_factors[static_cast<size_t>(feature)];
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

  void ChooseBlocks() {
    // Sizes are estimates, in floating point so that they cannot overflow.
    const double bags = static_cast<double>(attributes_.num_features) * static_cast<double>(batch_);
    const double ids_per_bag = std::max(1.0, static_cast<double>(in_.num_indices) / bags);
    const double bytes_per_bag = ids_per_bag * static_cast<double>(in_.width) * sizeof(float);
    const auto fitting = [](double bytes, int64_t most) {
      const double count = static_cast<double>(kBlockBytes) / bytes;
      return count >= static_cast<double>(most) ? most
                                                : std::max<int64_t>(1, static_cast<int64_t>(count));
    };
    slots_per_block_ = fitting(bytes_per_bag * static_cast<double>(kSamplesPerSlot), slots_);
    if (batch_ < kSamplesPerSlot) {  // few samples: let a block take more slots instead
      slots_per_block_ = fitting(bytes_per_bag * static_cast<double>(batch_), slots_);
    }
    samples_per_block_ = fitting(bytes_per_bag * static_cast<double>(slots_per_block_), batch_);
  }

  // Pools samples [b0, b1) of slots [t0, t1).
  void PoolBlock(int64_t t0, int64_t t1, int64_t b0, int64_t b1) {
    Chunk chunks[2];
    Cursor cursor{t0, b0, BagBegin(attributes_.features[static_cast<size_t>(t0)], b0)};
    Chunk* now = &chunks[0];
    Chunk* next = &chunks[1];
    Fill(cursor, t1, b0, b1, now);
    for (int i = 0; i < std::min(now->rows, Chunk::kAhead); ++i) __builtin_prefetch(now->row[i]);
    while (now->bags > 0) {
      Fill(cursor, t1, b0, b1, next);
      const int ahead = std::min(next->rows, Chunk::kAhead);
      std::copy_n(next->row, ahead, now->row + now->rows);
      std::fill_n(now->row + now->rows + ahead, Chunk::kAhead - ahead, nullptr);
      path_.pool_chunk(*now, in_.width);
      std::swap(now, next);
    }
  }

  // Takes the next bags, or parts of them, from the cursor on. An empty chunk: the block is done.
  void Fill(Cursor& cursor, int64_t t1, int64_t b0, int64_t b1, Chunk* chunk) {
    chunk->rows = 0;
    chunk->bags = 0;
    chunk->weighted = in_.has_per_sample_weights;
    chunk->one_hot = true;
    while (cursor.t < t1 && chunk->rows < Chunk::kRows && chunk->bags < Chunk::kBags) {
      const size_t slot = static_cast<size_t>(cursor.t);
      const int64_t feature = attributes_.features[slot];
      const bool mean = attributes_.mean[slot] == 1;
      const int64_t first = cursor.position;
      int room = Chunk::kRows - chunk->rows;
      // The ids of one slot's samples lie one after the other: first the bags, then all their ids.
      while (cursor.b < b1 && chunk->bags < Chunk::kBags) {
        const int64_t begin = BagBegin(feature, cursor.b);
        const int64_t end = BagEnd(feature, cursor.b);
        if (room == 0 && end > cursor.position) break;
        const int count = static_cast<int>(std::min<int64_t>(room, end - cursor.position));
        const bool last = cursor.position + count == end;
        BagPart& part = chunk->bag[chunk->bags++];
        part.out = pooled_ + (cursor.b * slots_ + cursor.t) * in_.width;
        part.divisor = mean && last && end > begin ? static_cast<float>(end - begin) : 1.0f;
        part.count = static_cast<uint16_t>(count);
        part.resume = cursor.position > begin;
        chunk->one_hot &= count == 1 && last && !part.resume;
        cursor.position += count;
        room -= count;
        if (!last) break;
        ++cursor.b;
      }
      Resolve(slot, first, cursor.position, chunk);
      if (cursor.b == b1) {
        ++cursor.t;
        cursor.b = b0;
        if (cursor.t < t1) {
          cursor.position = BagBegin(attributes_.features[static_cast<size_t>(cursor.t)], b0);
        }
      }
    }
  }

  void Resolve(size_t slot, int64_t first, int64_t last, Chunk* chunk) {
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
  void ResolveAs(size_t slot, int64_t first, int64_t last, Chunk* chunk) {
    const EmbeddingBagAttributes& a = attributes_;
    const bool plain = a.ids[slot] == a.rows[slot] && a.moduli[slot] == 0 &&
                       a.divisors[slot] == 1 && a.divisions[slot] == 0;
    if (plain) {
      ReadRows<policy>(slot, first, last, chunk->row + chunk->rows);
    } else {
      ComputeRows<policy>(slot, first, last, chunk->row + chunk->rows);
    }
    if (chunk->weighted) {
      std::copy(in_.per_sample_weights + first, in_.per_sample_weights + last,
                chunk->weight + chunk->rows);
    }
    chunk->rows += static_cast<int>(last - first);
  }

  // The rows of a slot where an id is the number of its row.
  template <IndexPolicy policy>
  void ReadRows(size_t slot, int64_t first, int64_t last, const float** out) {
    const int64_t rows = attributes_.rows[slot];
    const int64_t width = in_.width;
    const float* table = in_.weights + attributes_.row_starts[slot] * width;
    for (int64_t p = first; p < last; ++p) {
      int64_t id = ids_[p];
      *out++ = ValidId<policy>(rows, p, &id) ? table + id * width : nullptr;
    }
  }

  // The rows of a slot where a row is computed from an id.
  template <IndexPolicy policy>
  void ComputeRows(size_t slot, int64_t first, int64_t last, const float** out) {
    const EmbeddingBagAttributes& a = attributes_;
    const int64_t limit = a.ids[slot];
    const int64_t modulus = a.moduli[slot];
    const int64_t divisor = a.divisors[slot];
    const int64_t rows = a.rows[slot];
    const Division division = static_cast<Division>(a.divisions[slot]);
    const float float_divisor = static_cast<float>(divisor);
    const float reciprocal = 1.0f / float_divisor;
    const float* table = in_.weights + a.row_starts[slot] * in_.width;
    for (int64_t p = first; p < last; ++p) {
      int64_t id = ids_[p];
      if (modulus > 0) id = Modulo(id, modulus);
      if (!ValidId<policy>(limit, p, &id)) {
        *out++ = nullptr;
        continue;
      }
      int64_t row;
      if (division == Division::kExact) {
        row = id / divisor % rows;
      } else {
        const float rounded = static_cast<float>(id);
        const float quotient =
            division == Division::kFloat ? rounded / float_divisor : rounded * reciprocal;
        row = std::min(static_cast<int64_t>(quotient), rows - 1);
      }
      *out++ = table + row * in_.width;
    }
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
    const EmbeddingBagAttributes& a = attributes_;
    int64_t feature = 0;
    int64_t limit = kNone;
    for (size_t slot = 0; slot < a.features.size(); ++slot) {
      const int64_t f = a.features[slot];
      if (position < BagBegin(f, 0) || position >= BagEnd(f, batch_ - 1)) continue;
      int64_t id = ids_[position];
      if (a.moduli[slot] > 0) id = Modulo(id, a.moduli[slot]);
      if ((id < 0 || id >= a.ids[slot]) && a.ids[slot] < limit) {
        feature = f;
        limit = a.ids[slot];
      }
    }
    int64_t sample = 0;  // bags of a feature lie in order: halve the range that holds the position
    for (int64_t high = batch_ - 1; sample < high;) {
      const int64_t middle = sample + (high - sample) / 2;
      if (position < BagEnd(feature, middle)) {
        high = middle;
      } else {
        sample = middle + 1;
      }
    }
    return bag_.FeatureName(feature) + ", sample " + Text(sample) + ", position " +
           Text(position - BagBegin(feature, sample)) + " of its bag: id " + Text(ids_[position]) +
           " is outside [0, " + Text(limit) +
           "). Hash ids to the table size before scoring, or choose the index policy clamp, "
           "modulo or zero.";
  }

  const EmbeddingBag& bag_;
  const EmbeddingBagAttributes& attributes_;
  const EmbeddingBagInputs& in_;
  const Id* ids_;
  const Id* offsets_;
  const int64_t batch_;
  const int64_t slots_;
  const KernelPath& path_;
  float* pooled_;
  int64_t slots_per_block_ = 1;
  int64_t samples_per_block_ = 1;
  std::atomic<int64_t> first_bad_id_{kNone};
};

Error EmbeddingBag::Run(const EmbeddingBagInputs& inputs, int64_t batch, const KernelPath& path,
                        const BlockRunner& runner, float* pooled) const {
  if (inputs.id_type == IdType::kInt32) {
    return EmbeddingBagRun<int32_t>(*this, inputs, batch, path, pooled).Run(runner);
  }
  return EmbeddingBagRun<int64_t>(*this, inputs, batch, path, pooled).Run(runner);
}

}  // namespace dlrm_deploy
