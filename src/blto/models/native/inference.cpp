// A residual net in float32 with its batch norms folded away, from uint8 images to pooled features: what
// `blto.models.native.inference` calls.
//
// Layout. A thread takes a block of 32 images through the whole net, so small nets' maps stay in its caches:
//     [pixel][channel][2 groups][16 images]   float32.
// All arithmetic is over images, a register at a time; every channel of every pixel is the same code.
//
// Convolutions of 3x3 and stride 1 are Winograd's F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308): a tile of 4x4 outputs
// costs 36 products a channel pair instead of 144. All others are sums over the taps that lie inside the map.

#include "common.h"

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int OUTPUTS = 8;                  // output channels whose sums stay in registers, for both groups
constexpr int TILE = 4, PATCH = TILE + 2;   // sides of a tile's outputs and inputs
constexpr int POINTS = PATCH * PATCH;       // products of a tile and a channel pair

struct Convolution {    // padding is (kernel - 1) / 2
  const float* weight;  // [outputs / 8][taps][inputs][8], or transformed, [36][outputs / 8][inputs][8]; null: none
  const float* bias;    // [outputs]
  int32_t inputs, outputs, kernel, stride, is_transformed;
};

struct Block {  // relu(second(relu(first(x))) + shortcut(x)); without a shortcut x itself is added
  Convolution first, second, shortcut;
};

struct Map {
  float* values;
  int height, width, channels;
  size_t size() const { return size_t(height) * width * channels * BLOCK; }
  float* pixel(int row, int column) const { return values + (size_t(row) * width + column) * channels * BLOCK; }
};

int reduced(int side, int stride) { return (side + stride - 1) / stride; }

Map output_of(const Convolution& c, const Map& x, float* values) {
  return {values, reduced(x.height, c.stride), reduced(x.width, c.stride), c.outputs};
}

// What follows a sum: bias, residual (null: none) and ReLU.
struct Finish {
  const float* bias;
  const float* residual;
  bool activates;
  void operator()(__m512 sum, int output, size_t at, float* y) const {
    sum = _mm512_add_ps(sum, _mm512_set1_ps(bias[output]));
    if (residual) sum = _mm512_add_ps(sum, _mm512_load_ps(residual + at));
    _mm512_store_ps(y + at, activates ? relu(sum) : sum);
  }
};

// sums[k][group] += sum over c of weight[c][k] x[c][group]
[[gnu::always_inline]] inline void accumulate(const float* weight, const float* x, int inputs, __m512 (&sums)[OUTPUTS][2]) {
  for (int c = 0; c < inputs; ++c) {
    const __m512 first = _mm512_load_ps(x + size_t(c) * BLOCK), second = _mm512_load_ps(x + size_t(c) * BLOCK + GROUP);
#pragma GCC unroll 8
    for (int k = 0; k < OUTPUTS; ++k) {
      const __m512 w = _mm512_set1_ps(weight[size_t(c) * OUTPUTS + k]);
      sums[k][0] = _mm512_fmadd_ps(w, first, sums[k][0]);
      sums[k][1] = _mm512_fmadd_ps(w, second, sums[k][1]);
    }
  }
}

void convolve_directly(const Convolution& c, const Map& x, const Map& y, const Finish& finish) {
  const int taps = c.kernel * c.kernel, pad = (c.kernel - 1) / 2;
  for (int row = 0; row < y.height; ++row)
    for (int column = 0; column < y.width; ++column)
      for (int k = 0; k < c.outputs; k += OUTPUTS) {
        __m512 sums[OUTPUTS][2] = {};
        for (int tap = 0; tap < taps; ++tap) {
          const int from_row = row * c.stride + tap / c.kernel - pad, from = column * c.stride + tap % c.kernel - pad;
          if (from_row < 0 || from_row >= x.height || from < 0 || from >= x.width) continue;
          accumulate(c.weight + (size_t(k) * taps + size_t(tap) * OUTPUTS) * c.inputs, x.pixel(from_row, from), c.inputs,
                     sums);
        }
        const size_t at = size_t(y.pixel(row, column) - y.values) + size_t(k) * BLOCK;
        for (int i = 0; i < OUTPUTS; ++i)
          for (int group = 0; group < 2; ++group)
            finish(sums[i][group], k + i, at + size_t(i) * BLOCK + group * GROUP, y.values);
      }
}

// Six inputs in a row or column -> the six values whose products with the transformed weights are summed.
[[gnu::always_inline]] inline void transform_input(const __m512 (&d)[PATCH], __m512 (&v)[PATCH]) {
  const __m512 two = _mm512_set1_ps(2), four = _mm512_set1_ps(4), minus_five = _mm512_set1_ps(-5);
  const __m512 a = _mm512_fnmadd_ps(four, d[2], d[4]), b = _mm512_fnmadd_ps(four, d[1], d[3]);
  const __m512 e = _mm512_sub_ps(d[4], d[2]), f = _mm512_mul_ps(two, _mm512_sub_ps(d[3], d[1]));
  v[0] = _mm512_fmadd_ps(four, d[0], _mm512_fmadd_ps(minus_five, d[2], d[4]));
  v[1] = _mm512_add_ps(a, b);
  v[2] = _mm512_sub_ps(a, b);
  v[3] = _mm512_add_ps(e, f);
  v[4] = _mm512_sub_ps(e, f);
  v[5] = _mm512_fmadd_ps(four, d[1], _mm512_fmadd_ps(minus_five, d[3], d[5]));
}

// Six sums of products -> four outputs.
[[gnu::always_inline]] inline void transform_output(const __m512 (&m)[PATCH], __m512 (&y)[TILE]) {
  const __m512 two = _mm512_set1_ps(2), four = _mm512_set1_ps(4), eight = _mm512_set1_ps(8);
  const __m512 a = _mm512_add_ps(m[1], m[2]), b = _mm512_sub_ps(m[1], m[2]);
  const __m512 e = _mm512_add_ps(m[3], m[4]), f = _mm512_sub_ps(m[3], m[4]);
  y[0] = _mm512_add_ps(m[0], _mm512_add_ps(a, e));
  y[1] = _mm512_fmadd_ps(two, f, b);
  y[2] = _mm512_fmadd_ps(four, e, a);
  y[3] = _mm512_add_ps(_mm512_fmadd_ps(eight, f, b), m[5]);
}

// The patch of a tile, zeros outside the map, to v[36][channel][2][16].
void transform_patch(const Map& x, int top, int left, float* v) {
  alignas(64) static const float zeros[BLOCK] = {};
  const float* source[POINTS];
  size_t step[POINTS];
  for (int p = 0; p < POINTS; ++p) {
    const int row = top + p / PATCH, column = left + p % PATCH;
    const bool inside = row >= 0 && row < x.height && column >= 0 && column < x.width;
    source[p] = inside ? x.pixel(row, column) : zeros;
    step[p] = inside ? GROUP : 0;
  }
  for (int at = 0; at < 2 * x.channels; ++at) {
    __m512 half[PATCH][PATCH];
#pragma GCC unroll 6
    for (int column = 0; column < PATCH; ++column) {
      __m512 d[PATCH], made[PATCH];
      for (int row = 0; row < PATCH; ++row) {
        const int p = row * PATCH + column;
        d[row] = _mm512_load_ps(source[p] + at * step[p]);
      }
      transform_input(d, made);
      for (int row = 0; row < PATCH; ++row) half[row][column] = made[row];
    }
#pragma GCC unroll 6
    for (int row = 0; row < PATCH; ++row) {
      __m512 made[PATCH];
      transform_input(half[row], made);
      for (int column = 0; column < PATCH; ++column)
        _mm512_store_ps(v + (size_t(row * PATCH + column) * x.channels * 2 + at) * GROUP, made[column]);
    }
  }
}

// A tile's sums m[36][outputs][2][16] to its outputs, those inside the map.
void finish_tile(const float* m, const Map& y, int top, int left, const Finish& finish) {
  const int rows = std::min(TILE, y.height - top), columns = std::min(TILE, y.width - left);
  for (int at = 0; at < 2 * y.channels; ++at) {
    __m512 half[TILE][PATCH];
#pragma GCC unroll 6
    for (int column = 0; column < PATCH; ++column) {
      __m512 d[PATCH], made[TILE];
      for (int row = 0; row < PATCH; ++row)
        d[row] = _mm512_load_ps(m + (size_t(row * PATCH + column) * y.channels * 2 + at) * GROUP);
      transform_output(d, made);
      for (int row = 0; row < TILE; ++row) half[row][column] = made[row];
    }
    for (int row = 0; row < rows; ++row) {
      __m512 made[TILE];
      transform_output(half[row], made);
      float* first = y.pixel(top + row, left) + size_t(at) * GROUP;
      for (int column = 0; column < columns; ++column)
        finish(made[column], at / 2, size_t(first - y.values) + size_t(column) * y.channels * BLOCK, y.values);
    }
  }
}

// v and m: working memory for one tile, [36][inputs or outputs][2][16]
void convolve_by_tiles(const Convolution& c, const Map& x, const Map& y, const Finish& finish, float* v, float* m) {
  for (int top = 0; top < y.height; top += TILE)
    for (int left = 0; left < y.width; left += TILE) {
      transform_patch(x, top - 1, left - 1, v);
      for (int point = 0; point < POINTS; ++point)
        for (int k = 0; k < c.outputs; k += OUTPUTS) {
          __m512 sums[OUTPUTS][2] = {};
          accumulate(c.weight + (size_t(point) * c.outputs + k) * c.inputs, v + size_t(point) * c.inputs * BLOCK, c.inputs,
                     sums);
          float* target = m + (size_t(point) * c.outputs + k) * BLOCK;
          for (int i = 0; i < 2 * OUTPUTS; ++i) _mm512_store_ps(target + i * GROUP, sums[i / 2][i % 2]);
        }
      finish_tile(m, y, top, left, finish);
    }
}

// uint8 [image][channel][pixel] minus the centre, for `count` images of a block; the rest of it becomes zeros.
void load_images(const uint8_t* images, int count, const float* centre, const Map& x) {
  const int pixels = x.height * x.width;
  if (count < BLOCK) std::memset(x.values, 0, x.size() * sizeof(float));
  for (int c = 0; c < x.channels; ++c)
    for (int start = 0; start < pixels; start += GROUP)  // what is written for one run of pixels stays in cache
      for (int n = 0; n < count; ++n) {
        const uint8_t* plane = images + (size_t(n) * x.channels + c) * pixels;
        for (int p = start; p < std::min(start + GROUP, pixels); ++p)
          x.values[(size_t(p) * x.channels + c) * BLOCK + n] = float(plane[p]) - centre[c];
      }
}

// The mean over pixels of `count` images: features [image][channel].
void pool(const Map& x, int count, float* features) {
  const int pixels = x.height * x.width;
  const __m512 share = _mm512_set1_ps(1.0f / float(pixels));
  for (int at = 0; at < 2 * x.channels; ++at) {
    __m512 sum = _mm512_setzero_ps();
    for (int p = 0; p < pixels; ++p)
      sum = _mm512_add_ps(sum, _mm512_load_ps(x.values + (size_t(p) * x.channels * 2 + at) * GROUP));
    alignas(64) float lanes[GROUP];
    _mm512_store_ps(lanes, _mm512_mul_ps(sum, share));
    const int first = at % 2 * GROUP;
    for (int n = 0; n < GROUP && first + n < count; ++n) features[size_t(first + n) * x.channels + at / 2] = lanes[n];
  }
}

// The largest map of the net and the widest layer.
struct Sizes {
  size_t map = 0;
  int channels = 0;
  void see(const Map& x) { map = std::max(map, x.size()), channels = std::max(channels, x.channels); }
};

Sizes sizes_of(const Convolution& stem, const Block* blocks, int count, Map x) {
  Sizes sizes;
  sizes.see(x);
  sizes.see(x = output_of(stem, x, nullptr));
  for (int b = 0; b < count; ++b) {
    sizes.see(x = output_of(blocks[b].first, x, nullptr));
    sizes.see(x = output_of(blocks[b].second, x, nullptr));
  }
  return sizes;
}

}  // namespace

extern "C" {

// Features of `count` images.
//   images: uint8 [count][channels][height][width]; centre: [channels], subtracted, so that zero padding is the mean
//   features: float [count][outputs of the last block]
int blto_folded_features(const uint8_t* images, int count, int channels, int height, int width, const float* centre,
                         const Convolution* stem, const Block* blocks, int blocks_count, float* features) {
  const Map input{nullptr, height, width, channels};
  const Sizes sizes = sizes_of(*stem, blocks, blocks_count, input);
  const int outputs = blocks[blocks_count - 1].second.outputs;
  std::atomic<bool> failed{false};
#pragma omp parallel
  {
    static thread_local Scratch map_memory[3], tile_memory;
    float* maps[3];
    for (int i = 0; i < 3; ++i) maps[i] = map_memory[i].get<float>(sizes.map, failed);
    float* v = tile_memory.get<float>(size_t(2) * POINTS * sizes.channels * BLOCK, failed);
    float* m = v + size_t(POINTS) * sizes.channels * BLOCK;
    auto convolve = [&](const Convolution& c, const Map& x, float* values, const float* residual, bool activates) {
      const Map y = output_of(c, x, values);
      const Finish finish{c.bias, residual, activates};
      if (c.is_transformed)
        convolve_by_tiles(c, x, y, finish, v, m);
      else
        convolve_directly(c, x, y, finish);
      return y;
    };
#pragma omp barrier
#pragma omp for schedule(dynamic)
    for (int first = 0; first < (failed ? 0 : count); first += BLOCK) {
      const int here = std::min(BLOCK, count - first);
      Map x = input;
      x.values = maps[1];
      load_images(images + size_t(first) * channels * height * width, here, centre, x);
      x = convolve(*stem, x, maps[0], nullptr, true);
      for (int b = 0; b < blocks_count; ++b) {
        const Block& block = blocks[b];
        const Map inner = convolve(block.first, x, maps[1], nullptr, true);
        const float* residual = x.values;
        if (block.shortcut.weight) residual = convolve(block.shortcut, x, maps[2], nullptr, false).values;
        x = convolve(block.second, inner, maps[2], residual, true);
        std::swap(maps[0], maps[2]);
      }
      pool(x, here, features + size_t(first) * outputs);
    }
  }
  return failed ? NO_MEMORY : DONE;
}

}  // extern "C"
