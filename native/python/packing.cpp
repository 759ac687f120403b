#include "packing.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "format/choose.h"
#include "format/codes.h"
#include "format/layout.h"
#include "format/pack.h"

namespace nb = nanobind;
namespace format = losa::format;
template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<nb::numpy, T, nb::ndim<1>>;

namespace {

template <typename T>
Out<T> array_of(const T *from, size_t count) {
  auto copy = std::make_unique<T[]>(count + 1);
  std::copy_n(from, count, copy.get());
  T *data = copy.release();
  return Out<T>(data, {count}, nb::capsule(data, [](void *p) noexcept { delete[] static_cast<T *>(p); }));
}

void require(bool condition, const char *text) {
  if (!condition) {
    throw std::invalid_argument(text);
  }
}

losa_value_type value_type_of(int number) {
  require(number >= LOSA_F32 && number <= LOSA_I4, "no such value type");
  return static_cast<losa_value_type>(number);
}

format::Mask mask_of(const In<uint64_t> &words, size_t rows, size_t columns) {
  format::Mask mask(rows, columns);
  require(rows > 0 && columns > 0 && words.size() == mask.words.size(), "the mask has another shape");
  std::copy_n(words.data(), words.size(), mask.words.begin());
  const uint64_t behind = columns % 64 ? ~uint64_t{0} << columns % 64 : 0;
  for (size_t r = 0; r < rows; ++r) {
    require((mask.row(r)[mask.words_per_row - 1] & behind) == 0, "the mask has bits behind the columns");
    for (size_t w = 0; w < mask.words_per_row; ++w) {
      mask.counts[r] += static_cast<uint32_t>(__builtin_popcountll(mask.row(r)[w]));
    }
  }
  return mask;
}

Out<uint64_t> find_kept(int value_type, const In<uint8_t> &codes) {
  const losa_value_type type = value_type_of(value_type);
  require(codes.size() % losa::value_bytes(type) == 0, "codes are no whole values");
  const size_t columns = codes.size() / losa::value_bytes(type);
  std::vector<uint64_t> words((columns + 63) / 64);
  format::find_kept(type, codes.data(), columns, words.data());
  return array_of(words.data(), words.size());
}

nb::tuple choose(const In<uint64_t> &words, size_t rows, size_t columns, int value_type,
                 const std::string &terms) {
  require(terms == "in_file" || terms == "at_load", "terms are in_file or at_load");
  const format::Mask mask = mask_of(words, rows, columns);
  const losa_value_type type = value_type_of(value_type);
  const format::Terms &asked = terms == "in_file" ? format::kInFile : format::kAtLoad;
  const format::Choice choice = format::choose(format::statistics_of(mask, type, asked), type, asked);
  return nb::make_tuple(static_cast<int>(choice.layout), choice.pattern.n, choice.pattern.m);
}

nb::dict pack(int layout, int value_type, size_t rows, size_t columns, uint16_t group_size, unsigned n,
              unsigned m, const In<uint8_t> &codes, const In<uint64_t> &words, const In<uint16_t> &scales,
              size_t ranges) {
  const losa_value_type type = value_type_of(value_type);
  const size_t row_bytes = columns * losa::value_bytes(type);
  require(layout >= LOSA_DENSE && layout <= LOSA_SLIDING, "no such layout");
  require(n <= 32 && m <= 32, "no such pattern");
  require(ranges > 0, "rows are stored in one range or more");
  require(type != LOSA_I4 || group_size != 0, "i4 needs a group size");
  require(codes.size() == rows * row_bytes, "codes have another shape");
  require(scales.size() == rows * format::scales_of_row(type, columns, group_size),
          "scales have another shape");
  const format::Mask mask = mask_of(words, rows, columns);
  format::Packer packer(mask, {static_cast<losa_layout>(layout), {n, m}}, {type, group_size, scales.data()});
  std::vector<uint8_t> memory(packer.bytes(), 0xaa);  // whatever is not written shows
  const losa_parts &parts = packer.place(memory.data());
  const size_t step = packer.row_step(), steps = (rows + step - 1) / step;
  for (size_t i = ranges; i-- > 0;) {
    packer.store(step * (steps * i / ranges), std::min(rows, step * (steps * (i + 1) / ranges)),
                 [&](size_t row, uint8_t *) { return codes.data() + row * row_bytes; });
  }
  nb::dict components;
  const auto add = [&](const char *name, const losa_bytes &part) {
    if (part.bytes) {
      components[name] = array_of(static_cast<const uint8_t *>(part.data), part.bytes);
    }
  };
  add("positions", parts.positions);
  add("values", parts.values);
  add("scale", parts.scale);
  add("table", parts.table);
  return components;
}

}  // namespace

void register_packing(nb::module_ &module) {
  module.def("find_kept", &find_kept, nb::arg("value_type"), nb::arg("codes"),
             "Mask words of a row of codes: bits where they are not zero.");
  module.def("choose", &choose, nb::arg("words"), nb::arg("rows"), nb::arg("columns"), nb::arg("value_type"),
             nb::arg("terms"), "(layout, n, m) for mask words [rows * words of a row], in_file or at_load.");
  module.def("pack", &pack, nb::arg("layout"), nb::arg("value_type"), nb::arg("rows"), nb::arg("columns"),
             nb::arg("group_size"), nb::arg("n"), nb::arg("m"), nb::arg("codes"), nb::arg("words"),
             nb::arg("scales"), nb::arg("ranges") = 1,
             "Component bytes by name, of codes [rows * columns], one value or byte each, mask words and f16 "
             "scales. Rows are stored in so many ranges, the last one first.");
}
