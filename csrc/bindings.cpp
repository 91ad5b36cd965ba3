// fastlars._C: the only file that knows Python. Tensors are looked at through DLPack's C function
// table, which costs about 20 ns a tensor; torch itself is needed neither to build nor to link.
#include <pybind11/operators.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/api.h"
#include "layout.h"
#include "rules/all.h"
#if FASTLARS_BUILD_CUDA
#include "cuda/api.h"
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace fastlars {
namespace {

// Views tensors of the types that it was given, and no others: a subclass may keep its elements
// elsewhere.
class Viewer {
 public:
  Viewer(py::type tensor_type, const std::vector<py::type>& accepted) {
    const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
    const dlpack::ExchangeApi* api = nullptr;
    if (!capsule.is_none()) {
      api = static_cast<const dlpack::ExchangeApi*>(
          PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (api == nullptr) throw py::error_already_set();
    }
    while (api != nullptr && api->major != dlpack::kMajor) api = api->previous;
    if (api == nullptr || api->view_object == nullptr) {
      throw std::runtime_error(
          "this torch is too old: fastlars looks at tensors through a DLPack 1.x table, "
          "which torch publishes from 2.10 on");
    }
    view_ = api->view_object;
    for (const auto& type : accepted) accept(type);
  }

  void accept(const py::type& type) {
    if (!contains(type.ptr())) types_.push_back(type);
  }

  bool accepts(py::handle object) const {
    return contains(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
  }

  // A tensor that DLPack cannot describe (sparse, meta, ...) has no memory that a kernel could
  // read.
  dlpack::Tensor view(py::handle object, const char* list, std::size_t index) const {
    dlpack::Tensor tensor;
    if (view_(object.ptr(), &tensor) != 0) {
      PyErr_Clear();
      throw Mismatch(list, index, "device");
    }
    return tensor;
  }

 private:
  // A list of a few types: usually only torch's own two.
  bool contains(const PyObject* type) const {
    for (const auto& accepted : types_) {
      if (accepted.ptr() == type) return true;
    }
    return false;
  }

  int (*view_)(void*, dlpack::Tensor*);
  std::vector<py::type> types_;
};

struct BoundLayout : Layout {
  std::shared_ptr<Viewer> viewer;
};

std::unique_ptr<BoundLayout> make_layout(std::shared_ptr<Viewer> viewer, const py::list& weights) {
  auto layout = std::make_unique<BoundLayout>();
  for (std::size_t i = 0; i < weights.size(); ++i) {
    layout->add(viewer->view(weights[i], "weights", i));
  }
  layout->viewer = std::move(viewer);
  return layout;
}

// The addresses of a list's tensors, each taken after the tensor was compared with the layout.
template <class Difference>
std::vector<std::uintptr_t> addresses(const BoundLayout& layout, const py::list& tensors,
                                      const char* name, Difference&& difference) {
  if (tensors.size() != layout.size()) throw Mismatch(name, 0, "length");
  std::vector<std::uintptr_t> out;
  out.reserve(layout.size());
  for (std::size_t i = 0; i < layout.size(); ++i) {
    const py::handle object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (!layout.viewer->accepts(object)) throw Mismatch(name, i, "type");
    const dlpack::Tensor tensor = layout.viewer->view(object, name, i);
    const char* what = difference(i, tensor);
    if (what != nullptr) throw Mismatch(name, i, what);
    out.push_back(reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset);
  }
  return out;
}

TensorList make_tensor_list(const BoundLayout& layout, const py::list& weights,
                            const py::list& grads, const std::vector<py::list>& states,
                            const py::object& copies, const py::object& counters, int weight_dtype,
                            int grad_dtype, int state_dtype, int copy_dtype) {
  TensorList list;
  list.numel = layout.numel();
  list.weight_dtype = static_cast<Dtype>(weight_dtype);
  list.grad_dtype = static_cast<Dtype>(grad_dtype);
  list.state_dtype = static_cast<Dtype>(state_dtype);
  list.copy_dtype = static_cast<Dtype>(copy_dtype);
  const auto alike = [&](const py::list& tensors, Dtype dtype, const char* name) {
    return addresses(layout, tensors, name, [&](std::size_t i, const dlpack::Tensor& tensor) {
      return layout.difference(i, tensor, dtype);
    });
  };
  list.weight = alike(weights, list.weight_dtype, "weights");
  list.grad = alike(grads, list.grad_dtype, "grads");
  for (const auto& state : states) {
    list.state.push_back(alike(state, list.state_dtype, "states"));
  }
  if (!copies.is_none()) list.copy = alike(copies.cast<py::list>(), list.copy_dtype, "copies");
  if (!counters.is_none()) {
    const auto one = [&](std::size_t i, const dlpack::Tensor& tensor) {
      return layout.difference_of_counter(i, tensor);
    };
    list.counter = addresses(layout, counters.cast<py::list>(), "counters", one);
  }
  return list;
}

// Loops of every step over its parameters, which would be slow in the interpreter.

// The gradients of `params` if these are still the `known` ones and their gradients have these
// types; else None.
py::object gradients(const py::list& params, const py::list& known, const py::list& types) {
  static PyObject* const grad = PyUnicode_InternFromString("grad");
  if (params.size() != known.size() || params.size() != types.size()) return py::none();
  py::list out(params.size());
  for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(known.size()); ++i) {
    PyObject* const param = PyList_GET_ITEM(known.ptr(), i);
    if (PyList_GET_ITEM(params.ptr(), i) != param) return py::none();
    PyObject* const found = PyObject_GetAttr(param, grad);
    if (found == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(out.ptr(), i, found);
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(found));
    if (type != PyList_GET_ITEM(types.ptr(), i)) return py::none();
  }
  return std::move(out);
}

// One state of every tensor. KeyError where a tensor no longer has it.
py::list column(const py::list& states, const py::str& name) {
  py::list out(states.size());
  for (Py_ssize_t i = 0; i < static_cast<Py_ssize_t>(out.size()); ++i) {
    PyObject* const found = PyObject_GetItem(PyList_GET_ITEM(states.ptr(), i), name.ptr());
    if (found == nullptr) throw py::error_already_set();
    PyList_SET_ITEM(out.ptr(), i, found);
  }
  return out;
}

// Whether a dict's values are exactly these objects, in this order.
bool holds(const py::dict& dict, const py::list& values) {
  if (dict.size() != values.size()) return false;
  PyObject* value = nullptr;
  Py_ssize_t place = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict.ptr(), &place, nullptr, &value); ++i) {
    if (value != PyList_GET_ITEM(values.ptr(), i)) return false;
  }
  return true;
}

// The calls below release the interpreter lock, so that other Python threads run meanwhile.
using Released = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A rule's struct, made of all its hyper-parameters by name. Options that are words come as
// numbers.
template <class Rule>
void define_rule(py::module_& m) {
  py::class_<Rule>(m, Rule::name).def(py::init([](const py::kwargs& given) {
    Rule rule = {};
    std::size_t fields = 0, found = 0;
    Rule::fields([&](const char* name, auto member) {
      using Value = std::decay_t<decltype(rule.*member)>;
      using Number = std::conditional_t<std::is_enum_v<Value>, int, Value>;
      ++fields;
      if (!given.contains(name)) return;
      ++found;
      rule.*member = static_cast<Value>(given[name].template cast<Number>());
    });
    if (found != fields || found != given.size()) {
      throw py::type_error(std::string(Rule::name) +
                           " has other fields in fastlars.rules than in the compiled extension");
    }
    return rule;
  }));
}

// Calls for rules that measure, and for those that step: all but GradientNorm.
template <class Rule>
void define_cpu_calls(py::module_& m) {
  using Sums = Sums<Rule::sums>;
  if constexpr (Rule::sums > 0) {
    m.def(
        "cpu_measure",
        [](const Rule& rule, TensorList& list, double lr, double gradient_scale,
           std::uintptr_t sums) {
          cpu::measure(rule, {lr, gradient_scale}, list, pointer<Sums>(sums));
        },
        Released(), "rule"_a, "tensors"_a, "lr"_a, "gradient_scale"_a, "sums"_a);
  }
  if constexpr (Rule::steps) {
    m.def(
        "cpu_apply",
        [](const Rule& rule, TensorList& list, double lr, double gradient_scale,
           std::uintptr_t sums, std::uintptr_t report) {
          cpu::apply(rule, {lr, gradient_scale}, list, pointer<const Sums>(sums),
                     pointer<float>(report));
        },
        Released(), "rule"_a, "tensors"_a, "lr"_a, "gradient_scale"_a, "sums"_a, "report"_a);
    m.def(
        "cpu_step",
        [](const Rule& rule, TensorList& list, double lr, double gradient_scale,
           std::uintptr_t report) {
          cpu::step(rule, {lr, gradient_scale}, list, pointer<float>(report));
        },
        Released(), "rule"_a, "tensors"_a, "lr"_a, "gradient_scale"_a, "report"_a);
  }
}

#if FASTLARS_BUILD_CUDA

// Scalars of a step: by value, and those that are in device memory.
struct CudaScalars {
  StepScalars host;
  cuda::DeviceScalars device;
};

template <class Rule>
void define_cuda_calls(py::module_& m) {
  using cuda::ChunkTable;
  using Sums = Sums<Rule::sums>;
  if constexpr (Rule::sums > 0) {
    m.def(
        "cuda_measure",
        [](const Rule& rule, TensorList& list, const ChunkTable& table, const CudaScalars& scalars,
           std::uintptr_t sums, std::uintptr_t stream, int grid) {
          cuda::measure(rule, scalars.host,
                        {table, list, scalars.device, pointer<void>(stream), grid},
                        pointer<Sums>(sums));
        },
        Released(), "rule"_a, "tensors"_a, "table"_a, "scalars"_a, "sums"_a, "stream"_a, "grid"_a);
  }
  if constexpr (Rule::steps) {
    m.def(
        "cuda_apply",
        [](const Rule& rule, TensorList& list, const ChunkTable& table, const CudaScalars& scalars,
           std::uintptr_t sums, std::uintptr_t report, std::uintptr_t stream, int grid) {
          cuda::apply(rule, scalars.host,
                      {table, list, scalars.device, pointer<void>(stream), grid},
                      pointer<const Sums>(sums), pointer<float>(report));
        },
        Released(), "rule"_a, "tensors"_a, "table"_a, "scalars"_a, "sums"_a, "report"_a, "stream"_a,
        "grid"_a);
  }
  if constexpr (Rule::sums > 0 && Rule::steps) {
    m.def(
        "cuda_step",
        [](const Rule& rule, TensorList& list, const ChunkTable& table, const CudaScalars& scalars,
           std::uintptr_t report, std::uintptr_t stream, int grid, int shared_slots) {
          cuda::step(rule, scalars.host,
                     {table, list, scalars.device, pointer<void>(stream), grid, shared_slots},
                     pointer<float>(report));
        },
        Released(), "rule"_a, "tensors"_a, "table"_a, "scalars"_a, "report"_a, "stream"_a, "grid"_a,
        "shared_slots"_a);
  }
}

void define_cuda(py::module_& m) {
  using namespace cuda;
  py::register_exception<Error>(m, "CudaError", PyExc_RuntimeError);
  py::class_<CudaScalars>(m, "CudaScalars")
      .def(py::init([](double lr, double gradient_scale, const ScalarAddresses& addresses,
                       double limit) {
             return CudaScalars{{lr, gradient_scale}, {addresses, limit, gradient_scale}};
           }),
           "lr"_a, "gradient_scale"_a, "addresses"_a, "limit"_a);
  py::class_<ChunkTable> table(m, "CudaChunkTable");
  table.def(py::init([](const BoundLayout& layout) { return ChunkTable(layout.numel()); }))
      .def_property_readonly("tensors", &ChunkTable::tensors)
      .def_property_readonly("chunks", &ChunkTable::chunks)
      .def_property_readonly("workspace_bytes", &ChunkTable::workspace_bytes)
      .def("write_chunk_entries",
           [](const ChunkTable& t, std::uintptr_t at) {
             t.write_chunk_entries(pointer<ChunkEntry>(at));
           })
      .def("write_tensor_entries",
           [](const ChunkTable& t, const TensorList& list, std::uintptr_t at) {
             return t.write_tensor_entries(list, pointer<TensorEntry>(at));
           })
      .def("place", &ChunkTable::place, "chunk_entries"_a, "tensor_entries"_a, "workspace"_a);
  table.attr("chunk_entry_bytes") = sizeof(ChunkEntry);
  table.attr("tensor_entry_bytes") = sizeof(TensorEntry);
  Rules::for_each([&](auto rule) { define_cuda_calls<decltype(rule)>(m); });
  m.def("cuda_why_not", &why_not);
}

#else

void define_cuda(py::module_&) {}

#endif

py::dict build_info() {
  return py::dict("version"_a = FASTLARS_VERSION, "build_type"_a = FASTLARS_BUILD_TYPE,
                  "compiler"_a = FASTLARS_BUILD_COMPILER, "openmp"_a = FASTLARS_BUILD_OPENMP,
                  "cuda"_a = FASTLARS_BUILD_CUDA != 0, "cuda_reason"_a = FASTLARS_BUILD_CUDA_REASON,
                  "cuda_serves"_a = FASTLARS_BUILD_CUDA_SERVES,
                  "cuda_version"_a = FASTLARS_BUILD_CUDA_VERSION,
                  "cuda_archs"_a = FASTLARS_BUILD_CUDA_ARCHS);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fastlars. Use the optimizers in fastlars instead.";
  // pybind11 would set the exception's args to one string: the translator sets all three.
  static py::exception<Mismatch> mismatch(m, "Mismatch", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Mismatch& error) {
      const py::tuple args = py::make_tuple(error.list, error.index, error.what_differs);
      PyErr_SetObject(mismatch.ptr(), args.ptr());
    }
  });

  py::class_<Viewer, std::shared_ptr<Viewer>>(m, "Viewer")
      .def(py::init<py::type, const std::vector<py::type>&>(), "tensor_type"_a, "accepted"_a)
      .def("accept", &Viewer::accept, "type"_a);
  py::class_<BoundLayout>(m, "Layout")
      .def(py::init(&make_layout), "viewer"_a, "weights"_a)
      .def(py::self == py::self);
  py::class_<TensorList>(m, "TensorList")
      .def(
          "set_step",  // what belongs to one step alone; addresses are 0 for none
          [](TensorList& list, std::optional<std::uint64_t> seed, std::uintptr_t gradient_sums,
             std::uintptr_t random_streams) {
            list.stochastic_rounding = seed.has_value();
            list.seed = seed.value_or(0);
            list.gradient_sums = pointer<const double>(gradient_sums);
            list.random_streams = pointer<const std::int32_t>(random_streams);
          },
          "seed"_a, "gradient_sums"_a, "random_streams"_a)
      .def(
          "write_table",
          [](const TensorList& list, std::uintptr_t at) {
            return write_table(list, Rules::most_states, pointer<std::int64_t>(at));
          },
          "table"_a);
  m.def("tensor_list", &make_tensor_list, "layout"_a, "weights"_a, "grads"_a, "states"_a,
        "copies"_a, "counters"_a, "weight_dtype"_a, "grad_dtype"_a, "state_dtype"_a,
        "copy_dtype"_a);
  m.def("gradients", &gradients, "params"_a, "known"_a, "types"_a);
  m.def("column", &column, "states"_a, "name"_a);
  m.def("holds", &holds, "dict"_a, "values"_a);

  m.attr("TABLE_COLUMNS") = 4 + Rules::most_states;  // of TensorList.write_table

  Rules::for_each([&](auto rule) {
    define_rule<decltype(rule)>(m);
    define_cpu_calls<decltype(rule)>(m);
  });
  define_cuda(m);

  m.def("instruction_set", &cpu::instruction_set);
  m.def("build_info", &build_info);
}

}  // namespace fastlars
