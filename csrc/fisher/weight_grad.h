// The weight gradient of one sample, which every Fisher kernel squares.
//
// Layers with a weight differ only in how their input is read. All are a convolution of an input
// that is padded already; a linear map has a kernel of 1 and its positions along the last
// dimension. With x the input, e the gradient of the output, and s, d stride and dilation, the
// gradient of sample b for output o and input channel c of a group at kernel offset k is
//
//   G_b[o, (c, k)] = Σ_n Σ_p e[n, o, p] · x[n, c, s p + d k],
//
// n over the images of the sample (usually one) and p over the places of the output.
#pragma once

#include <array>
#include <cstdint>

namespace fitcompress {

struct WeightGradShape {
  int64_t samples;  // B
  int64_t images;   // consecutive rows of both tensors that make up one sample
  int64_t groups;
  int64_t outputs;   // of a group
  int64_t channels;  // of a group
  // Depth, height, width:
  std::array<int64_t, 3> space;   // of the padded input
  std::array<int64_t, 3> places;  // of the output
  std::array<int64_t, 3> kernel, stride, dilation;
  // In elements: image, channel, depth, height, width. Any strides.
  std::array<int64_t, 5> input_strides, grad_strides;

  int64_t kernel_volume() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t inputs() const { return channels * kernel_volume(); }            // I
  int64_t positions() const { return places[0] * places[1] * places[2]; }  // P of one image
};

}  // namespace fitcompress
