// The Python module bertrt._native: checks the arrays' types and shapes, allocates outputs, releases the GIL. Values
// are checked by the engine.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.h"
#include "error.h"
#include "isa.h"
#include "names.h"
#include "peak.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int Dimensions>
using Input = nb::ndarray<const T, nb::numpy, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

using Shape = std::vector<int64_t>;

// Outputs are arrays of NumPy's own.
class Outputs {
 public:
  template <class T>
  T* add(const char* name, const char* dtype, const Shape& shape) {
    const nb::object array = numpy_.attr("empty")(nb::tuple(nb::cast(shape)), dtype);
    arrays_[name] = array;
    return nb::cast<nb::ndarray<T, nb::c_contig, nb::device::cpu>>(array).data();
  }
  float* add_floats(const char* name, const Shape& shape) { return add<float>(name, "float32", shape); }
  const nb::dict& arrays() const { return arrays_; }

 private:
  nb::module_ numpy_ = nb::module_::import_("numpy");
  nb::dict arrays_;
};

[[noreturn]] void refuse(const std::string& message) {
  throw bertrt::Error(bertrt::ErrorCode::kInvalidArgument, message);
}

nb::dict run(const bertrt::Engine& engine, const Input<int32_t, 1>& input_ids, const Input<int32_t, 1>& token_type_ids,
             const Input<int64_t, 1>& offsets, const std::optional<Input<int64_t, 1>>& mlm_positions, bool mlm_logits,
             int64_t top_k, const std::optional<Input<int64_t, 2>>& candidates, bool hidden_states, bool pooled,
             bool nsp, bool layers) {
  const bertrt::Architecture& sizes = engine.architecture();
  const auto length = [](const auto& array) { return static_cast<int64_t>(array.shape(0)); };
  const int64_t tokens = length(input_ids), sequences = length(offsets) - 1;
  if (length(token_type_ids) != tokens) {
    refuse("token_type_ids has " + std::to_string(length(token_type_ids)) + " elements, but input_ids has " +
           std::to_string(tokens));
  }
  if (sequences < 1) refuse("offsets has " + std::to_string(length(offsets)) + " elements, but must have at least 2");
  if (!mlm_positions && (mlm_logits || top_k != 0 || candidates)) {
    refuse("mlm_logits, top_k and candidates need mlm_positions");
  }
  if (top_k < 0 || top_k > sizes.vocab) {
    refuse("top_k is " + std::to_string(top_k) + ", but must be from 0 to the size of the vocabulary, " +
           std::to_string(sizes.vocab));
  }
  const int64_t asked = mlm_positions ? length(*mlm_positions) : 0;
  if (candidates && length(*candidates) != asked) {
    refuse("candidates has " + std::to_string(length(*candidates)) + " rows, but mlm_positions has " +
           std::to_string(asked) + " elements");
  }

  const bertrt::Batch batch = {input_ids.data(), token_type_ids.data(), tokens, offsets.data(), sequences};
  bertrt::Request request;
  Outputs outputs;
  if (mlm_positions) {
    // An empty array may have no data; what is asked for is still the head.
    static const int64_t nowhere = 0;
    request.mlm_positions = asked > 0 ? mlm_positions->data() : &nowhere;
    request.mlm_count = asked;
    if (mlm_logits) request.mlm_logits = outputs.add_floats("mlm_logits", {asked, sizes.vocab});
    if (top_k > 0) {
      request.top_k = top_k;
      request.top_ids = outputs.add<int64_t>("mlm_top_ids", "int64", {asked, top_k});
      request.top_log_probs = outputs.add_floats("mlm_top_log_probs", {asked, top_k});
    }
    if (candidates) {
      request.candidates = candidates->data();
      request.candidate_count = static_cast<int64_t>(candidates->shape(1));
      request.candidate_log_probs = outputs.add_floats("mlm_candidate_log_probs", {asked, request.candidate_count});
    }
  }
  if (hidden_states) request.hidden_states = outputs.add_floats("hidden_states", {tokens, sizes.hidden});
  if (pooled) request.pooled = outputs.add_floats("pooled", {sequences, sizes.hidden});
  if (nsp) request.nsp_logits = outputs.add_floats("nsp_logits", {sequences, 2});
  if (layers) request.layers = outputs.add_floats("layers", {sizes.layers + 1, tokens, sizes.hidden});
  {
    const nb::gil_scoped_release released;
    engine.run(batch, request);
  }
  return outputs.arrays();
}

nb::dict architecture(const bertrt::Engine& engine) {
  const bertrt::Architecture& sizes = engine.architecture();
  nb::dict result;
  result["hidden_size"] = sizes.hidden;
  result["num_hidden_layers"] = sizes.layers;
  result["num_attention_heads"] = sizes.heads;
  result["intermediate_size"] = sizes.intermediate;
  result["vocab_size"] = sizes.vocab;
  result["max_position_embeddings"] = sizes.positions;
  result["type_vocab_size"] = sizes.segments;
  result["hidden_act"] = bertrt::activation_name(sizes.activation);
  result["layer_norm_eps"] = static_cast<double>(sizes.norm_epsilon);
  result["precision"] = bertrt::precision_name(sizes.precision);
  result["mlm"] = sizes.has_mlm;
  result["nsp"] = sizes.has_nsp;
  result["pooler"] = sizes.has_pooler;
  return result;
}

std::vector<std::pair<std::string, std::string>> isa_status() {
  std::vector<std::pair<std::string, std::string>> status;
  for (int i = bertrt::kIsaCount - 1; i >= 0; --i) {
    const auto isa = static_cast<bertrt::Isa>(i);
    status.emplace_back(bertrt::isa_name(isa), bertrt::isa_problem(isa));
  }
  return status;
}

bertrt::Isa active_isa() {
  const bertrt::KernelTable* active = &bertrt::select_kernels();
  int index = 0;
  while (bertrt::kernels_of(static_cast<bertrt::Isa>(index)) != active) ++index;
  return static_cast<bertrt::Isa>(index);
}

bertrt::Isa isa_named(const std::string& name) {
  for (int i = 0; i < bertrt::kIsaCount; ++i) {
    if (name == bertrt::isa_name(static_cast<bertrt::Isa>(i))) return static_cast<bertrt::Isa>(i);
  }
  refuse("'" + name + "' is not the name of an instruction set");
}

double peak(const std::string& kind, const std::optional<std::string>& isa, double seconds) {
  if (kind != "int8" && kind != "float") refuse("kind is '" + kind + "', but must be 'int8' or 'float'");
  const bertrt::Isa which = isa ? isa_named(*isa) : active_isa();
  const nb::gil_scoped_release released;
  return bertrt::measure_peak(kind == "int8" ? bertrt::PeakKind::kInt8 : bertrt::PeakKind::kFloat, which, seconds);
}

// Makes the Python exception and has bertrt::Error raised as it.
void define_error(nb::module_& module) {
  nb::dict members;
  members["code"] = "";
  PyObject* type = PyErr_NewExceptionWithDoc("bertrt._native.Error",
                                             "What the kernels refuse or fail at. ``code`` says which: "
                                             "\"invalid_argument\", \"not_found\",\n\"bad_file\", \"missing_head\", "
                                             "\"unsupported\", \"out_of_memory\" or \"system\".",
                                             nullptr, members.ptr());
  if (type == nullptr) nb::raise_python_error();
  module.attr("Error") = nb::steal(type);
  nb::register_exception_translator(
      [](const std::exception_ptr& thrown, void* payload) {
        try {
          std::rethrow_exception(thrown);
        } catch (const bertrt::Error& error) {
          const nb::handle error_type(static_cast<PyObject*>(payload));
          const nb::object raised = error_type(error.what());
          raised.attr("code") = bertrt::error_name(error.code());
          PyErr_SetObject(error_type.ptr(), raised.ptr());
        }
      },
      type);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "BERT on the CPU: the native kernels. Use it through bertrt.Engine.";
  module.attr("__version__") = BERTRT_VERSION;
  define_error(module);

  nb::class_<bertrt::Engine>(module, "Engine", "A weight file opened for runs. May be used by many threads at once.")
      .def(
          "__init__",
          [](bertrt::Engine* self, const std::string& path, int threads, bool pin, bool verify, bool huge) {
            const nb::gil_scoped_release released;
            new (self) bertrt::Engine(path, {threads, pin, verify, huge});
          },
          "path"_a, "threads"_a = 0, "pin"_a = false, "verify"_a = true, "huge"_a = false,
          "Open a weight file (not an engine folder). ``threads`` of each run; 0: the processors that the process may\n"
          "use. ``pin`` binds them to processors, ``verify`` compares the checksums of the weights, ``huge`` copies them into\n"
          "pages of 2 MB.")
      .def("run", &run, "input_ids"_a.noconvert(), "token_type_ids"_a.noconvert(), "offsets"_a.noconvert(),
           nb::kw_only(), "mlm_positions"_a.noconvert() = nb::none(), "mlm_logits"_a = false, "top_k"_a = 0,
           "candidates"_a.noconvert() = nb::none(), "hidden_states"_a = false, "pooled"_a = false, "nsp"_a = false,
           "layers"_a = false,
           nb::sig("def run(self, input_ids: numpy.typing.NDArray[numpy.int32], "
                   "token_type_ids: numpy.typing.NDArray[numpy.int32], offsets: numpy.typing.NDArray[numpy.int64], *, "
                   "mlm_positions: numpy.typing.NDArray[numpy.int64] | None = None, mlm_logits: bool = False, "
                   "top_k: int = 0, candidates: numpy.typing.NDArray[numpy.int64] | None = None, "
                   "hidden_states: bool = False, pooled: bool = False, nsp: bool = False, layers: bool = False) "
                   "-> dict[str, numpy.typing.NDArray[typing.Any]]"),
           "Compute what is asked for, on C-contiguous arrays: ``input_ids`` and ``token_type_ids`` ``[tokens]``,\n"
           "``offsets`` ``[sequences + 1]``, ``mlm_positions`` ``[n]``, ``candidates`` ``[n, c]``.\n\n"
           "Returns:\n"
           "    What was asked for, of ``mlm_logits`` ``[n, vocab]``, ``mlm_top_ids`` ``[n, k] int64``,\n"
           "    ``mlm_top_log_probs`` ``[n, k]``, ``mlm_candidate_log_probs`` ``[n, c]``, ``hidden_states``\n"
           "    ``[tokens, hidden]``, ``pooled`` ``[sequences, hidden]``, ``nsp_logits`` ``[sequences, 2]`` and "
           "``layers``\n"
           "    ``[layers + 1, tokens, hidden]``; float32 where nothing else is said.")
      .def_prop_ro("isa", &bertrt::Engine::isa, "The instruction set in use.")
      .def_prop_ro("threads", &bertrt::Engine::threads, "Threads of each run.")
      .def_prop_ro("weight_bytes", &bertrt::Engine::weight_bytes, "Bytes of the weight file.")
      .def_prop_ro("architecture", &architecture,
                   nb::sig("def architecture(self) -> dict[str, int | float | str | bool]"),
                   "Sizes and constants, by the names of the manifest.");

  module.def("isa_status", &isa_status,
             "Instruction sets, best first, each with why it cannot be used here, or an empty string.");
  module.def(
      "active_isa", [] { return bertrt::isa_name(active_isa()); },
      "The instruction set that an engine opened now would use.\n\n"
      "Raises:\n"
      "    Error: BERTRT_ISA names none that can be used here.");
  module.def("peak", &peak, "kind"_a, "isa"_a = nb::none(), "seconds"_a = 0.2,
             "Operations per second of one core on registers, two for each multiply-add.\n\n"
             "``kind`` is ``\"int8\"`` or ``\"float\"``; ``isa`` names an instruction set, by default the active one.");
}
