// Python module _C: integers in, pointers out. No torch, no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace lomo;

namespace {

void raise_if(Status status, const char* name) {
  if (status) throw std::runtime_error(std::string(name) + ": " + status);
}

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A list of tensors comes as the address of rows of int64 with the layout of a struct. Python knows
// its fields by name, in the order in which they lie in memory.
template <typename Struct>
class Fields {
 public:
  template <typename Base, typename Field>
  Fields& add(const char* name, Field Base::* field) {
    static_assert(sizeof(Field) == sizeof(int64_t));
    const Struct whole{};
    const auto* at = reinterpret_cast<const char*>(&(whole.*field));
    names_[(at - reinterpret_cast<const char*>(&whole)) / sizeof(int64_t)] = name;
    return *this;
  }
  const std::vector<std::string>& names() const { return names_; }

 private:
  std::vector<std::string> names_ = std::vector<std::string>(sizeof(Struct) / sizeof(int64_t));
};

template <typename Struct>
Fields<Struct> adalomo_fields() {
  Fields<Struct> fields;
  fields.add("param", &AdaRef::param).add("grad", &AdaRef::grad).add("low", &AdaRef::low);
  fields.add("row", &AdaRef::row).add("col", &AdaRef::col).add("step", &AdaRef::step);
  fields.add("sums", &AdaRef::sums);
  fields.add("batch", &AdaRef::batch).add("rows", &AdaRef::rows).add("cols", &AdaRef::cols);
  fields.add("numel", &AdaRef::numel).add("param_id", &AdaRef::param_id);
  return fields.add("factored", &AdaRef::factored);
}

py::dict structs() {
  Fields<TensorRef> tensor;
  tensor.add("param", &TensorRef::param).add("grad", &TensorRef::grad).add("low", &TensorRef::low);
  tensor.add("numel", &TensorRef::numel).add("offset", &TensorRef::offset);
  tensor.add("param_id", &TensorRef::param_id);
  Fields<GradRef> grad;
  grad.add("grad", &GradRef::grad).add("numel", &GradRef::numel);
  Fields<AdaPart> part = adalomo_fields<AdaPart>();
  part.add("kept", &AdaPart::kept)
      .add("passing", &AdaPart::passing)
      .add("offset", &AdaPart::offset);
  part.add("whole_rows", &AdaPart::whole_rows).add("whole_numel", &AdaPart::whole_numel);
  part.add("joined", &AdaPart::joined).add("slot", &AdaPart::slot);
  part.add("number", &AdaPart::number);
  py::dict found;
  found["TensorRef"] = tensor.names();
  found["GradRef"] = grad.names();
  found["AdaRef"] = adalomo_fields<AdaRef>().names();
  found["AdaPart"] = part.names();
  return found;
}

// Binds one update function; `where` are the trailing arguments that say where to run.
template <typename... Where>
auto lomo_update(Status (*run)(const TensorRef*, int64_t, DType, DType, Rounding, const UpdateArgs&,
                               Where...),
                 const char* name) {
  return [=](uintptr_t rows, int64_t count, int param, int grad, int rounding, double lr,
             double decay, double clip_value, uint32_t step, uint64_t seed, uintptr_t inv_scale,
             uintptr_t clip_coef, uintptr_t found_inf, uintptr_t skip, Where... where) {
    const UpdateArgs args{float(lr),
                          float(decay),
                          float(clip_value),
                          step,
                          seed,
                          pointer<const float>(inv_scale),
                          pointer<const float>(clip_coef),
                          pointer<float>(found_inf),
                          pointer<const float>(skip)};
    const py::gil_scoped_release nogil;
    raise_if(run(pointer<const TensorRef>(rows), count, DType(param), DType(grad),
                 Rounding(rounding), args, where...),
             name);
  };
}

template <typename... Where>
auto grad_sumsq(Status (*run)(const GradRef*, int64_t, DType, const SumsqArgs&, Where...),
                const char* name) {
  return [=](uintptr_t rows, int64_t count, int grad, uintptr_t inv_scale, uintptr_t found_inf,
             uintptr_t out, uintptr_t partials, Where... where) {
    const SumsqArgs args{pointer<const float>(inv_scale), pointer<float>(found_inf),
                         pointer<float>(out), pointer<float>(partials)};
    const py::gil_scoped_release nogil;
    raise_if(run(pointer<const GradRef>(rows), count, DType(grad), args, where...), name);
  };
}

template <typename... Where>
auto decide(Status (*run)(const DecideArgs&, Where...), const char* name) {
  return [=](uintptr_t decisions, uintptr_t out, uintptr_t sumsq, int64_t count,
             uintptr_t found_inf, int64_t flags, double max_norm, double min_scale,
             double growth_factor, double backoff_factor, int64_t growth_interval, Where... where) {
    const DecideArgs args{pointer<float>(decisions),
                          pointer<float>(out),
                          pointer<const float>(sumsq),
                          count,
                          pointer<const float>(found_inf),
                          flags,
                          float(max_norm),
                          float(min_scale),
                          growth_factor,
                          backoff_factor,
                          growth_interval};
    const py::gil_scoped_release nogil;
    raise_if(run(args, where...), name);
  };
}

template <typename Ref, typename... Where>
auto adalomo(Status (*run)(const Ref*, int64_t, DType, DType, Rounding, const AdaArgs&, Where...),
             const char* name) {
  return [=](uintptr_t rows, int64_t count, int param, int grad, int rounding, double lr,
             double weight_decay, double eps_square, double eps_rms, double clip_threshold,
             double clip_value, uint64_t seed, uintptr_t inv_scale, uintptr_t clip_coef,
             uintptr_t found_inf, uintptr_t skip, uintptr_t weights, int64_t weights_count,
             Where... where) {
    const AdaArgs args{float(lr),
                       float(weight_decay),
                       float(eps_square),
                       float(eps_rms),
                       float(clip_threshold),
                       float(clip_value),
                       seed,
                       pointer<const float>(inv_scale),
                       pointer<const float>(clip_coef),
                       pointer<float>(found_inf),
                       pointer<const float>(skip),
                       pointer<const float>(weights),
                       weights_count};
    const py::gil_scoped_release nogil;
    raise_if(run(pointer<const Ref>(rows), count, DType(param), DType(grad), Rounding(rounding),
                 args, where...),
             name);
  };
}

// All functions of the CPU take a number of threads; a decision needs one.
Status cpu_decide(const DecideArgs& args, int) { return cpu::decide(args); }

Status cpu_adalomo_update(const AdaRef* t, int64_t count, DType param, DType grad,
                          Rounding rounding, const AdaArgs& args, uintptr_t scratch, int threads) {
  return cpu::adalomo_update(t, count, param, grad, rounding, args, pointer<float>(scratch),
                             threads);
}

Status cpu_adalomo_parts(const AdaPart* t, int64_t count, DType param, DType grad,
                         Rounding rounding, const AdaArgs& args, int call, uintptr_t statistics,
                         uintptr_t squares, int threads) {
  const AdaMessages messages{pointer<float>(statistics), pointer<float>(squares)};
  return cpu::adalomo_parts(t, count, param, grad, rounding, args, AdaCall(call), messages,
                            threads);
}

template <typename... Where>
auto adalomo_sums(Status (*run)(const AdaRef&, DType, Where...), const char* name) {
  return [=](uintptr_t row, int param, Where... where) {
    const py::gil_scoped_release nogil;
    raise_if(run(*pointer<const AdaRef>(row), DType(param), where...), name);
  };
}

#ifdef LOMO_WITH_CUDA
// A stream is an address; pybind11 has no caster from int to void*.
Status cuda_lomo_update(const TensorRef* t, int64_t count, DType param, DType grad,
                        Rounding rounding, const UpdateArgs& args, int device, uintptr_t stream) {
  return cuda::lomo_update(t, count, param, grad, rounding, args, device, pointer<void>(stream));
}

Status cuda_grad_sumsq(const GradRef* t, int64_t count, DType grad, const SumsqArgs& args,
                       uintptr_t counters, bool fresh, int device, uintptr_t stream) {
  const Tickets tickets{pointer<uint32_t>(counters), fresh};
  return cuda::grad_sumsq(t, count, grad, args, tickets, device, pointer<void>(stream));
}

Status cuda_decide(const DecideArgs& args, int device, uintptr_t stream) {
  return cuda::decide(args, device, pointer<void>(stream));
}

Status cuda_adalomo_update(const AdaRef* t, int64_t count, DType param, DType grad,
                           Rounding rounding, const AdaArgs& args, uintptr_t scratch, int device,
                           uintptr_t stream) {
  return cuda::adalomo_update(t, count, param, grad, rounding, args, pointer<float>(scratch),
                              device, pointer<void>(stream));
}

Status cuda_adalomo_parts(const AdaPart* t, int64_t count, DType param, DType grad,
                          Rounding rounding, const AdaArgs& args, int call, uintptr_t statistics,
                          uintptr_t squares, int device, uintptr_t stream) {
  const AdaMessages messages{pointer<float>(statistics), pointer<float>(squares)};
  return cuda::adalomo_parts(t, count, param, grad, rounding, args, AdaCall(call), messages, device,
                             pointer<void>(stream));
}

Status cuda_adalomo_sums(const AdaRef& t, DType param, int device, uintptr_t stream) {
  return cuda::adalomo_sums(t, param, device, pointer<void>(stream));
}
#endif

// The arguments of each function by name, in their order, without those that say where to run.
// Python fills them by name.
py::dict arguments() {
  using Names = std::vector<std::string>;
  Names adalomo = {"rows",       "count",        "param",        "grad",      "rounding",
                   "lr",         "weight_decay", "eps_square",   "eps_rms",   "clip_threshold",
                   "clip_value", "seed",         "inv_scale",    "clip_coef", "found_inf",
                   "skip",       "weights",      "weights_count"};
  const auto with = [&](const Names& more) {
    Names all = adalomo;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  py::dict found;
  found["lomo_update"] =
      Names{"rows",       "count", "param", "grad",      "rounding",  "lr",        "decay",
            "clip_value", "step",  "seed",  "inv_scale", "clip_coef", "found_inf", "skip"};
  found["grad_sumsq"] =
      Names{"rows", "count", "grad", "inv_scale", "found_inf", "sumsq", "partials"};
  found["decide"] =
      Names{"decisions", "out",       "sumsq",         "count",          "found_inf",      "flags",
            "max_norm",  "min_scale", "growth_factor", "backoff_factor", "growth_interval"};
  found["adalomo_update"] = with({"scratch"});
  found["adalomo_parts"] = with({"call", "statistics", "squares"});
  found["adalomo_sums"] = Names{"row", "param"};
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::dict dtypes, roundings, calls;
  dtypes["float32"] = int(DType::float32);
  dtypes["bfloat16"] = int(DType::bfloat16);
  dtypes["float16"] = int(DType::float16);
  roundings["nearest"] = int(Rounding::nearest);
  roundings["stochastic"] = int(Rounding::stochastic);
  roundings["split"] = int(Rounding::split);
  calls["statistics"] = int(AdaCall::statistics);
  calls["squares"] = int(AdaCall::squares);
  calls["update"] = int(AdaCall::update);
  m.attr("dtypes") = dtypes;
  m.attr("roundings") = roundings;
  m.attr("adalomo_calls") = calls;
  m.attr("norm_chunk") = kNormChunk;
  m.attr("tickets") = kTickets;
  m.attr("structs") = structs();
  m.attr("arguments") = arguments();
  m.attr("compiler") = LOMO_COMPILER;

  m.def("cpu_lomo_update", lomo_update(&cpu::lomo_update, "lomo_update_ on the CPU"));
  m.def("cpu_grad_sumsq", grad_sumsq(&cpu::grad_sumsq, "grad_sumsq_ on the CPU"));
  m.def("cpu_decide", decide(&cpu_decide, "decide_ on the CPU"));
  m.def("cpu_adalomo_update", adalomo(&cpu_adalomo_update, "adalomo_update_ on the CPU"));
  m.def("cpu_adalomo_parts", adalomo(&cpu_adalomo_parts, "AdalomoParts on the CPU"));
  m.def("cpu_adalomo_sums", adalomo_sums(&cpu::adalomo_sums, "adalomo_sums_ on the CPU"));
  m.def("adalomo_scratch", [](uintptr_t rows, int64_t count) {
    return adalomo_scratch(pointer<const AdaRef>(rows), count);
  });
  m.def("adalomo_sizes",
        [](int64_t batch, int64_t rows, int64_t cols, bool factored, int64_t whole_rows) {
          const AdaSizes sizes = adalomo_sizes(batch, rows, cols, factored, whole_rows);
          return py::make_tuple(sizes.kept, sizes.passing);
        });
  m.def("cpu_instruction_set", &cpu::instruction_set);
  m.def("cpu_use_instruction_set", &cpu::use_instruction_set);

#ifdef LOMO_WITH_CUDA
  m.attr("cuda_compiler") = LOMO_CUDA_COMPILER;
  m.attr("cuda_architectures") = LOMO_CUDA_ARCHITECTURES;
  m.def("cuda_lomo_update", lomo_update(&cuda_lomo_update, "lomo_update_ on CUDA"));
  m.def("cuda_grad_sumsq", grad_sumsq(&cuda_grad_sumsq, "grad_sumsq_ on CUDA"));
  m.def("cuda_decide", decide(&cuda_decide, "decide_ on CUDA"));
  m.def("cuda_adalomo_update", adalomo(&cuda_adalomo_update, "adalomo_update_ on CUDA"));
  m.def("cuda_adalomo_parts", adalomo(&cuda_adalomo_parts, "AdalomoParts on CUDA"));
  m.def("cuda_adalomo_sums", adalomo_sums(&cuda_adalomo_sums, "adalomo_sums_ on CUDA"));
  m.def("cuda_device_count", [] {
    int count = 0;
    raise_if(cuda::device_count(&count), "cuda_device_count");
    return count;
  });
  m.def("cuda_unavailable", &cuda::unavailable);  // None: the kernels can run on that device
#else
  m.attr("cuda_compiler") = "";
  m.attr("cuda_architectures") = "";
#endif
}
