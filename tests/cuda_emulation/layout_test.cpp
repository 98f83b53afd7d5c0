// Index arithmetic that hosts and kernels share: where weights, activations and segments lie.
#include <algorithm>
#include <set>
#include <vector>

#include "claims.h"
#include "cuda/attention_parts.h"
#include "cuda/cuda_matrix.h"
#include "cuda/kv_layout.h"
#include "cuda/rows_mma.h"
#include "cuda/segments.h"
#include "cuda/wgmma_tiles.h"
#include "quant/quantized_row.h"

using namespace llama_ext;
using namespace llama_ext::cuda;
using claims::expect;

namespace {

/// Banks of 4 bytes that a warp's words lie in, when each lane reads one.
template <typename Word>
bool is_free_of_conflicts(Word&& word, int lanes = 32) {
  std::set<int> banks;
  for (int lane = 0; lane < lanes; ++lane) banks.insert(word(lane) % 32);
  return static_cast<int>(banks.size()) == lanes;
}

void check_activations() {
  bool is_a_permutation = true;
  bool is_conflict_free = true;
  for (const int parts : {1, 2, 4, 8}) {
    std::set<int> places;
    for (int chunk = 0; chunk < 64; ++chunk) {
      for (int part = 0; part < parts; ++part) places.insert(activation_place(chunk, part, parts));
    }
    is_a_permutation = is_a_permutation && static_cast<int>(places.size()) == 64 * parts && *places.begin() == 0 &&
                       *places.rbegin() == 64 * parts - 1;
    // 16-byte reads go in groups of 8 lanes, over 8 times 4 banks.
    for (int first = 0; first < 32; first += 8) {
      for (int part = 0; part < parts; ++part) {
        std::set<int> groups;
        for (int lane = 0; lane < 8; ++lane) groups.insert(activation_place(first + lane, part, parts) % 8);
        is_conflict_free = is_conflict_free && groups.size() == 8;
      }
    }
  }
  expect(is_a_permutation, "activations in shared memory have a place each");
  expect(is_conflict_free, "eight lanes that read vectors of their chunks meet in no bank");
}

/// rows_mma.h: whether the columns of x of a kind have a place each, and lanes that read vectors of them at once meet in no bank.
template <Kind kKind>
bool columns_are_sound() {
  using namespace rows_mma;
  constexpr int kStepElements = kStep<kKind>;
  constexpr int kBytes = is_quantized(kKind) ? 1 : 2;  // of an element in a column
  bool is_sound = true;
  std::set<int> places;
  for (int k = 0; k < 2 * kStepElements; ++k) {
    const int four = k / 4 * 4;  // stored at once, from its first place on
    places.insert(kBytes * (place_of_digit<kKind>(four) + k % 4));
  }
  is_sound = is_sound && static_cast<int>(places.size()) == 2 * kStepElements &&
             *places.rbegin() == kBytes * (2 * kStepElements - 1);
  // Lane t of row g of W reads its chunk in vectors of 16 bytes, of column g or, of one column alone, of that one.
  for (const int padded : {kStepElements, 2 * kStepElements, 3 * kStepElements}) {
    for (const int columns : {1, 2, 8}) {
      for (int part = 0; part < kStepElements * kBytes / 64; ++part) {
        for (int first = 0; first < 32; first += 8) {
          std::set<int> vectors;
          std::set<int> banks;
          for (int lane = first; lane < first + 8; ++lane) {
            const int column = std::min(lane / 4, columns - 1);
            const int at = column * column_pitch<kKind>(padded) + part * 64 + lane % 4 * 16;
            is_sound = is_sound && at % 16 == 0;
            vectors.insert(at);
            banks.insert(at / 16 % 8);
          }
          is_sound = is_sound && banks.size() == vectors.size();
        }
      }
    }
  }
  // The vectors of a chunk of nibbles are its first 16 elements and its last.
  for (int k = 0; k < kStepElements; k += 16) {
    const int part = kKind == Kind::kQ4 ? k / 16 % 2 : 0;
    const int t = kKind == Kind::kQ4 ? k / kChunk : k / 16;
    if (is_quantized(kKind)) is_sound = is_sound && place_of_digit<kKind>(k) == part * 64 + t * 16;
  }
  return is_sound;
}

void check_columns() {
  expect(columns_are_sound<Kind::kBF16>() && columns_are_sound<Kind::kQ8>() && columns_are_sound<Kind::kQ4>(),
         "few rows of x have a place for each element, and lanes that read them at once meet in no bank");
}

void check_fragments() {
  // mma.h: a lane reads the word of row g = lane / 4, pair t = lane % 4. Pitches of matmul_mma.cu and attention_mma.cu, in words.
  bool is_conflict_free = true;
  for (const int pitch : {(64 + 8) / 2, (128 + 8) / 2}) {
    is_conflict_free = is_conflict_free && is_free_of_conflicts([&](int lane) { return lane / 4 * pitch + lane % 4; });
    // 16-byte stores and ldmatrix: eight rows at a time, of four banks each.
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(row * pitch % 32 / 4);
    is_conflict_free = is_conflict_free && banks.size() == 8 && pitch % 4 == 0;
  }
  expect(is_conflict_free, "fragments of products meet in no bank, and rows stay aligned to 16 bytes");
}

/// Of 5 rows, the last 3.
bool some_rows_are_in_place(WeightView whole) {
  const std::vector<unsigned char> memory(static_cast<size_t>(whole.nbytes));
  whole.data = memory.data();
  const WeightView some = slice_rows(whole, 2, 3);
  const auto planes = planes_of(whole);
  const auto planes_of_some = planes_of(some);
  bool are_in_place = some.rows == 3;
  for (size_t i = 0; i < kPlanes; ++i) {
    const int64_t bytes = planes[i].row_bytes;
    if (bytes == 0) continue;
    are_in_place = are_in_place && planes_of_some[i].row_bytes == bytes &&
                   some.data - whole.data + planes_of_some[i].begin == planes[i].begin + 2 * bytes;
  }
  return are_in_place;
}

void check_weights() {
  std::set<std::pair<int, int>> nibbles;
  for (int i = 0; i < kChunk; ++i) nibbles.insert({nibble_byte(i), nibble_shift(i)});
  expect(nibbles.size() == kChunk, "the codes of a chunk have a nibble each");

  bool planes_are_apart = true;
  bool rows_are_aligned = true;
  bool codes_come_back = true;
  bool rows_are_in_place = true;
  for (const EncodingInfo& info : kEncodings) {
    for (const int group : {32, 64, 128}) {
      const bool is_free = info.encoding >= Encoding::kInt8 && info.group == 0;
      if (!is_free && group != 32) continue;
      const WeightType type = weight_type(info.name, is_free ? group : 0, "test");
      for (const int64_t cols : {int64_t{1}, int64_t{31}, int64_t{256}, int64_t{300}}) {
        const WeightView view = weight_layout(5, cols, type);
        rows_are_aligned = rows_are_aligned && view.row_bytes() % 16 == 0 && view.stride % kPad == 0;
        int64_t end = 0;
        for (const Plane& plane : planes_of(view)) {
          if (plane.row_bytes == 0) continue;
          planes_are_apart = planes_are_apart && plane.begin >= end && plane.begin % 4 == 0;
          end = plane.begin + 5 * plane.row_bytes;
        }
        planes_are_apart = planes_are_apart && end <= view.nbytes;
        rows_are_in_place = rows_are_in_place && some_rows_are_in_place(view);
        if (!type.is_quantized()) continue;
        QuantizedRow row;
        row.resize(type, cols);
        uint32_t state = 1;
        const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
        for (uint8_t& code : row.codes) code = static_cast<uint8_t>(next() & ((1u << info.bits) - 1));
        for (uint16_t& scale : row.scales) scale = static_cast<uint16_t>(next() & 0x3fffu);
        for (uint16_t& min : row.mins) min = static_cast<uint16_t>(next() & 0x3fffu);
        for (uint8_t& scale : row.sub_scales) scale = static_cast<uint8_t>(next());
        for (uint8_t& min : row.sub_mins) min = static_cast<uint8_t>(next());
        HostRows rows(view, 5);
        rows.store(3, row);
        QuantizedRow found;
        rows.load(3, type, found);
        codes_come_back = codes_come_back && found.codes == row.codes && found.scales == row.scales &&
                          found.mins == row.mins && found.sub_scales == row.sub_scales &&
                          found.sub_mins == row.sub_mins;
      }
    }
  }
  expect(planes_are_apart, "the planes of a matrix lie one after the other within its memory");
  expect(rows_are_aligned, "rows begin where 16 bytes can be read");
  expect(rows_are_in_place, "some rows of a matrix lie where they lie in all of it");
  expect(codes_come_back, "codes, scales and minima of every encoding come back as they were");
}

void check_segments() {
  std::vector<KvSegmentView> segments(53);
  int64_t all = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    segments[i].tokens = static_cast<int64_t>(i * 7 % 5);
    segments[i].row = all;
    all += segments[i].tokens;
  }
  std::vector<int64_t> rows;
  for_each_list(segments.data(), static_cast<int64_t>(segments.size()), [&](const SegmentList& list) {
    for (int64_t token = 0; token < list.tokens; ++token) {
      int64_t index = token;
      const KvSegmentView& segment = list.find(index);
      rows.push_back(segment.row + index);
    }
  });
  bool is_complete = static_cast<int64_t>(rows.size()) == all;
  for (size_t i = 0; is_complete && i < rows.size(); ++i) is_complete = rows[i] == static_cast<int64_t>(i);
  expect(is_complete, "lists of segments meet every token once, in order");
  expect(kv_row_bytes(KvKind::kF32, 3) == 16 && kv_row_bytes(KvKind::kBF16, 9) == 32 &&
             kv_row_bytes(KvKind::kI8, 128) == 128,
         "rows of a cache are padded to 16 bytes");
}

void check_slices() {
  // Segments of 0 to 4 tokens, each at a position of its own.
  SegmentList list;
  for (int i = 0; i < kMostSegments; ++i) {
    KvSegmentView& segment = list.of[list.count++];
    segment.tokens = i * 7 % 5;
    segment.row = list.tokens;
    segment.position = 100 * i;
    list.tokens += segment.tokens;
  }
  bool is_complete = true;
  bool is_small = true;
  for (const int64_t most : {int64_t{1}, int64_t{3}, int64_t{7}, list.tokens}) {
    int64_t row = 0;
    for (int64_t first = 0; first < list.tokens; first += most) {
      const SegmentList slice = tokens_of(list, first, most);
      is_small = is_small && slice.tokens == std::min(most, list.tokens - first);
      for (int64_t token = 0; token < slice.tokens; ++token, ++row) {
        int64_t found = token;
        int64_t expected = row;
        const KvSegmentView& segment = slice.find(found);
        const KvSegmentView& whole = list.find(expected);
        is_complete = is_complete && segment.row + found == row && whole.row + expected == row &&
                      segment.position + found == whole.position + expected;
      }
    }
    is_complete = is_complete && row == list.tokens;
  }
  expect(is_complete, "slices of a list meet every token once, in order, at its position");
  expect(is_small, "a slice has as many tokens as were asked for");

  const int64_t parts = (int64_t{128} << 10) / kAttentionPartKeys;
  const auto bytes_of = [&](int64_t tokens, int heads) { return tokens * heads * parts * (128 + 2) * 4; };
  const int64_t most = tokens_of_slice(32, parts, 128);
  expect(bytes_of(most, 32) <= kMostPartialBytes && bytes_of(most + 1, 32) > kMostPartialBytes,
         "the parts of a slice have as much memory as they may have");
  expect(most >= 16 && tokens_of_slice(32, 2 * parts, 128) >= 8,
         "a batch that decodes at 128 K positions is one slice");
  expect(tokens_of_slice(128, 65535, 128) == 1, "a slice has one token at least");
}

void check_tiles() {
  bool meets_every_tile_once = true;
  bool stays_in_its_band = true;
  for (const TileShape& shape : kTileShapes) {
    for (const int64_t rows : {int64_t{1}, int64_t{128}, int64_t{129}, int64_t{2048}, int64_t{5000}}) {
      for (const int64_t columns : {int64_t{1}, int64_t{64}, int64_t{3072}, int64_t{4100}}) {
        const TileGrid grid = tile_grid(rows, columns, shape.cluster, shape.columns);
        std::set<std::pair<int, int>> places;
        int band = 0;
        for (int i = 0; i < grid.count(); ++i) {
          const TilePlace place = tile_place(grid, i);
          places.insert({place.row_group, place.column});
          stays_in_its_band = stays_in_its_band && place.row_group / grid.band >= band;
          band = place.row_group / grid.band;
          meets_every_tile_once =
              meets_every_tile_once && int64_t{place.row_group} * shape.cluster * kTileRows < rows &&
              int64_t{place.column} * shape.columns < columns && place.row_group >= 0 && place.column >= 0;
        }
        meets_every_tile_once = meets_every_tile_once && static_cast<int>(places.size()) == grid.count() &&
                                int64_t{grid.row_groups} * shape.cluster * kTileRows >= rows &&
                                int64_t{grid.columns} * shape.columns >= columns;
      }
    }
  }
  expect(meets_every_tile_once, "every tile of a product is met once, and none lies outside");
  expect(stays_in_its_band, "a band of rows is done before the next begins");

  const auto columns_of = [](int64_t rows, int64_t columns, int k) {
    return kTileShapes[choose_tile_shape(rows, columns, k / kTileDepth, 132)].columns;
  };
  expect(columns_of(2048, 4096, 4096) == 256 && columns_of(2048, 28672, 4096) == 256,
         "large products are made of the largest tiles");
  expect(columns_of(2048, 3072, 2048) == 192,
         "192 tiles of 256 columns would take two rounds of 132, as 256 narrower do");
  expect(columns_of(128, 2048, 8192) == 64, "few rows are made of narrow tiles, so that more multiprocessors have one");

  // A warp's 8 rows of a 16-byte vector, and a row's 8 vectors, meet in no bank; and all places differ.
  bool is_conflict_free = true;
  std::set<int> places;
  for (int row = 0; row < 64; ++row) {
    for (int vector = 0; vector < 8; ++vector) places.insert(swizzled_byte(row, vector));
  }
  for (int vector = 0; vector < 8; ++vector) {
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(swizzled_byte(row, vector) % 128);
    is_conflict_free = is_conflict_free && banks.size() == 8;
  }
  expect(is_conflict_free && places.size() == 64 * 8 && *places.rbegin() == 64 * 128 - 16,
         "swizzled vectors have a place each, and a column of them meets in no bank");
}

}  // namespace

int main() {
  check_activations();
  check_columns();
  check_fragments();
  check_weights();
  check_segments();
  check_slices();
  check_tiles();
  return claims::exit_status();
}
