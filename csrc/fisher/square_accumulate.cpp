#include "fisher/square_accumulate.h"

namespace fitcompress {

// One element of G_b.
static double weight_grad(const WeightGradShape& s, const float* e, const float* x, int64_t b,
                          int64_t g, int64_t o, int64_t i) {
  const int64_t kw = i % s.kernel[2], kh = i / s.kernel[2] % s.kernel[1];
  const int64_t kd = i / s.kernel[2] / s.kernel[1] % s.kernel[0], c = i / s.kernel_volume();
  float sum = 0;
  for (int64_t n = b * s.images; n < (b + 1) * s.images; ++n)
    for (int64_t d = 0; d < s.places[0]; ++d)
      for (int64_t h = 0; h < s.places[1]; ++h)
        for (int64_t w = 0; w < s.places[2]; ++w) {
          const auto& t = s.grad_strides;
          const auto& u = s.input_strides;
          sum += e[n * t[0] + (g * s.outputs + o) * t[1] + d * t[2] + h * t[3] + w * t[4]] *
                 x[n * u[0] + (g * s.channels + c) * u[1] +
                   (d * s.stride[0] + kd * s.dilation[0]) * u[2] +
                   (h * s.stride[1] + kh * s.dilation[1]) * u[3] +
                   (w * s.stride[2] + kw * s.dilation[2]) * u[4]];
        }
  return sum;
}

template <class Moment>
void square_accumulate_cpu(const WeightGradShape& s, const float* output_grad, const float* input,
                           double scale, Moment* moment, double* norms) {
  for (int64_t b = 0; b < s.samples; ++b)
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t o = 0; o < s.outputs; ++o)
        for (int64_t i = 0; i < s.inputs(); ++i) {
          const double value = weight_grad(s, output_grad, input, b, g, o, i);
          const double square = scale * value * value;
          if (moment != nullptr) {
            Moment& to = moment[(g * s.outputs + o) * s.inputs() + i];
            to = static_cast<Moment>(to + square);
          }
          if (norms != nullptr) norms[b] += square;
        }
}

template void square_accumulate_cpu(const WeightGradShape&, const float*, const float*, double,
                                    float*, double*);
template void square_accumulate_cpu(const WeightGradShape&, const float*, const float*, double,
                                    double*, double*);

}  // namespace fitcompress
