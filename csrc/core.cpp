// Python bindings of fitcompress/_core, and nothing else: check, unlock, call, wrap.
#include <pybind11/pybind11.h>

#include "search/knapsack_bindings.h"
#include "search/path_bindings.h"
#include "storage/codec_bindings.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Searches and entropy coder of fitcompress, without torch.";
  fitcompress::bind_knapsack(m);
  fitcompress::bind_codec(m);
  fitcompress::bind_path_search(m);
}
