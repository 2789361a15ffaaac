// Packing for the products of gram.h: features of places as panels, panel[f][p], one for each
// vector of places.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/isa.h"
#include "common/transpose.h"
#include "fisher/ghost_places.h"

namespace fitcompress {

constexpr int64_t kGramFeatures = 128;      // of a block, at most
constexpr int64_t kGramPanels = 96 * 1024;  // floats of all its panels, if that many do

// Feature f at a place: data[f · feature_stride + offset of the place].
struct GramOperand {
  const float* data;
  const float* end;  // of the tensor
  int64_t feature_stride;
  const Places* places;
};

// Neighbours that come to lie in one panel.
struct GramPiece {
  int64_t from, to, length;
};

struct GramScratch {
  float* panels;      // [gram_panels(places)]
  GramPiece* pieces;  // [2 places]
};

constexpr int64_t gram_features(int64_t places) {
  const int64_t fit = kGramPanels / std::max<int64_t>(1, places) / 32 * 32;
  return std::max<int64_t>(32, std::min(kGramFeatures, fit));
}

// Floats that the panels take of at most so many places, of rows and columns together. Fewer places
// have more features in a block.
constexpr int64_t gram_panels(int64_t places, int64_t features) {
  const int64_t padded = places + 2 * 15, most = std::min(features, kGramFeatures);
  return std::min(std::max(kGramPanels, 32 * places) + 2 * 15 * most, padded * most) + padded;
}

// Adjacent features: blocks of Lanes places and features are transposed.
template <int Lanes>
FITCOMPRESS_INLINE void pack_transposed(const GramOperand& operand, int64_t first, int64_t count,
                                        int64_t size, float* panels) {
  alignas(64) static constexpr float kZeros[kGramFeatures] = {};
  const Places& places = *operand.places;
  for (int64_t begin = 0; begin < places.count; begin += Lanes, panels += size) {
    const float* rows[Lanes];
    for (int l = 0; l < Lanes; ++l) {
      rows[l] =
          begin + l < places.count ? operand.data + first + places.offsets()[begin + l] : kZeros;
    }
    int64_t f = 0;
    for (; f + Lanes <= count; f += Lanes) {
      const auto row = [&](int i) __attribute__((always_inline)) { return rows[i] + f; };
      transpose<Lanes>(row, panels + f * Lanes);
    }
    for (; f < count; ++f)
      for (int l = 0; l < Lanes; ++l) panels[f * Lanes + l] = rows[l][f];
  }
}

// Cuts the runs of places at the borders of panels.
inline int64_t cut_pieces(const Places& places, int lanes, int64_t size, GramPiece* pieces) {
  int64_t count = 0;
  for (int64_t r = 0; r < places.runs; ++r) {
    const PlaceRun& run = places.run(r);
    for (int64_t i = 0, length; i < run.length; i += length) {
      const int64_t p = run.first + i;
      length = std::min(lanes - p % lanes, run.length - i);
      pieces[count++] = {run.at + i * places.step, p / lanes * size + p % lanes, length};
    }
  }
  return count;
}

// The vector of from[0], from[step], …, for step 1 or 2.
template <int Lanes, size_t... L>
FITCOMPRESS_INLINE void copy_vector(std::index_sequence<L...>, const float* from, int64_t step,
                                    float* to) {
  using Vector = typename VectorOf<Lanes>::Type;
  Vector low, high;
  std::memcpy(&low, from, sizeof(Vector));
  if (step == 2) {
    std::memcpy(&high, from + Lanes, sizeof(Vector));
    low = __builtin_shufflevector(low, high, (2 * L)...);
  }
  std::memcpy(to, &low, sizeof(Vector));
}

// Adjacent places, or every second one, in pieces. A whole vector is copied of each: what is too
// much is overwritten by the next piece, or feature, or zeros; only at the end of the tensor it
// must not be read.
template <int Lanes>
FITCOMPRESS_INLINE void pack_pieces(const GramOperand& operand, int64_t first, int64_t count,
                                    int64_t size, GramPiece* pieces, float* panels) {
  const Places& places = *operand.places;
  const int64_t step = places.step, rest = places.count % Lanes;
  const int64_t number = cut_pieces(places, Lanes, size, pieces);
  const float* row = operand.data + first * operand.feature_stride;
  float* const zeros = panels + places.count / Lanes * size + rest;
  int64_t reach = 0;  // of a feature
  for (int64_t i = 0; i < number; ++i) reach = std::max(reach, pieces[i].from);
  reach += (step == 2 ? 2 : 1) * Lanes;
  for (int64_t f = 0; f < count; ++f, row += operand.feature_stride, panels += Lanes) {
    const bool whole = operand.end - row >= reach;
    if (step == 1 && whole) {
      for (int64_t i = 0; i < number; ++i) {
        copy_vector<Lanes>(std::make_index_sequence<Lanes>(), row + pieces[i].from, 1,
                           panels + pieces[i].to);
      }
    } else if (step == 2 && whole) {
      for (int64_t i = 0; i < number; ++i) {
        copy_vector<Lanes>(std::make_index_sequence<Lanes>(), row + pieces[i].from, 2,
                           panels + pieces[i].to);
      }
    } else {
      for (int64_t i = 0; i < number; ++i) {
        const GramPiece& piece = pieces[i];
        for (int64_t p = 0; p < piece.length; ++p) {
          panels[piece.to + p] = row[piece.from + p * step];
        }
      }
    }
    if (rest > 0) std::memset(zeros + f * Lanes, 0, Lanes * sizeof(float));
  }
}

// Features [first, first + count) as panels of `size` floats, with zeros beyond the last place.
// `size` leaves room for one feature more.
template <int Lanes>
FITCOMPRESS_INLINE void pack(const GramOperand& operand, int64_t first, int64_t count, int64_t size,
                             GramPiece* pieces, float* panels) {
  if (operand.feature_stride == 1 && operand.places->step != 1) {
    pack_transposed<Lanes>(operand, first, count, size, panels);
  } else {
    pack_pieces<Lanes>(operand, first, count, size, pieces, panels);
  }
}

}  // namespace fitcompress
