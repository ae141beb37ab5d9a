// embedding_bag.cc: what is checked before any id is read.
#include "kernels/embedding_bag.h"

#include <limits>
#include <memory>
#include <utility>

#include "kernels/prepared_bags.h"

namespace dlrm_deploy {
namespace {

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
// Valid ids are below this, so that they and their float32 neighbours fit in 64 bits.
constexpr int64_t kMostIds = int64_t{1} << 62;

std::string Text(int64_t value) { return std::to_string(value); }

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
  if (attributes.formats.empty() != (attributes.width == 0)) {
    return "attribute width is " + Text(attributes.width) +
           ", expected the embedding width where formats is given, and none otherwise";
  }
  if (attributes.ids.empty()) attributes.ids = attributes.rows;
  for (const auto& [values, otherwise] : {std::pair(&attributes.moduli, 0),
                                          {&attributes.divisors, 1},
                                          {&attributes.divisions, 0},
                                          {&attributes.formats, 0}}) {
    if (values->empty()) values->assign(attributes.features.size(), otherwise);
  }
  const EmbeddingBagAttributes& a = attributes;
  if (a.num_features < 1) {
    return "attribute num_features is " + Text(a.num_features) + ", expected at least 1";
  }
  if (slots == 0) return "attribute features is empty, expected one feature per slot";
  if (a.width < 0 || a.width > kMostWidth) {
    return "attribute width is " + Text(a.width) + ", expected 1 to " + Text(kMostWidth);
  }
  for (const auto& [name, values] : {std::pair("row_starts", &a.row_starts),
                                     {"formats", &a.formats},
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
    if (a.formats[t] < 0 || a.formats[t] >= kRowFormats) {
      return "attribute formats" + slot + " is " + Text(a.formats[t]) + ", expected 0 to " +
             Text(kRowFormats - 1);
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
  if (a.width != 0 && a.width != in.width) {
    return "the rows have width " + Text(in.width) + ", expected that of attribute width, " +
           Text(a.width);
  }
  if (in.width < 0 || in.width > kMostWidth) {
    return "the rows have width " + Text(in.width) + ", expected at most " + Text(kMostWidth);
  }
  for (int64_t t = 0; t < slots(); ++t) {
    const RowFormat row_format = format(static_cast<size_t>(t));
    const RowMatrix& matrix = in.matrix(row_format);
    const auto reads = [&] {
      return "slot " + Text(t) + " (" + FeatureName(a.features[t]) + ") reads rows [" +
             Text(a.row_starts[t]) + ", " + Text(a.row_starts[t] + a.rows[t]) + "), but " +
             MatrixName(row_format);
    };
    if (!matrix.given) return reads() + " is missing";
    if (a.rows[t] > matrix.rows || a.row_starts[t] > matrix.rows - a.rows[t]) {
      return reads() + " has " + Text(matrix.rows) + " rows";
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

Error EmbeddingBag::Run(const EmbeddingBagInputs& inputs, int64_t batch, const KernelPath& path,
                        const BlockRunner& runner, float* pooled) const {
  std::unique_ptr<PreparedBags> bags;
  if (Error error = PreparedBags::Prepare(*this, inputs, batch, path, runner, &bags)) return error;
  bags->PoolTogether(runner, 0, batch, pooled);
  return bags->BadId();
}

}  // namespace dlrm_deploy
