#include "pytensor.h"

#include "cuda.h"
#include "exchange.h"

namespace fusedopt {
namespace {

struct Torch {
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  PyObject* dispatch = nullptr;  // torch.Tensor.__torch_dispatch__
  PyGetSetDef* grad = nullptr;   // torch.Tensor.grad
  int32_t device_type = -1;
};

Torch torch;

// Tensors, parameters and their plain subclasses lie where DLPack says. A subclass with a
// __torch_dispatch__ of its own may be a wrapper around something else.
bool is_exact(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.parameter_type || type == torch.tensor_type;
}

bool is_plain(PyObject* object) {
  if (is_exact(object)) return true;
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch.tensor_type))) return false;
  py::handle dispatch = py::type::handle_of(object).attr("__torch_dispatch__");
  return dispatch.ptr() == torch.dispatch;
}

bool find_dtype(uint8_t code, int bits, DType* dtype) {
  struct Known {
    uint8_t code;
    int bits;
    DType dtype;
  };
  static constexpr Known kKnown[] = {
      {dlpack::kFloat, 32, DType::kFloat32},   {dlpack::kFloat, 64, DType::kFloat64},
      {dlpack::kBFloat, 16, DType::kBFloat16}, {dlpack::kFloat, 16, DType::kFloat16},
      {dlpack::kComplex, 32, DType::kFloat32}, {dlpack::kComplex, 64, DType::kFloat64},
      {dlpack::kComplex, 16, DType::kFloat16}, {dlpack::kInt, 16, DType::kInt16},
      {dlpack::kInt, 64, DType::kInt64},       {dlpack::kUInt, 8, DType::kUInt8}};
  for (const Known& known : kKnown) {
    if (known.code != code || known.bits != bits) continue;
    *dtype = known.dtype;
    return true;
  }
  return false;
}

bool asks(PyObject* tensor, const char* method) {
  return py::handle(tensor).attr(method)().cast<bool>();
}

}  // namespace

void bind_torch(py::object tensor_type, py::object parameter_type) {
  py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr) {
    throw py::import_error("this torch offers no DLPack exchange API of major version 1");
  }
  torch.api = api;
  torch.dispatch = py::object(tensor_type.attr("__torch_dispatch__")).release().ptr();
  const py::object grad = tensor_type.attr("grad");
  if (Py_TYPE(grad.ptr()) == &PyGetSetDescr_Type) {
    torch.grad = reinterpret_cast<PyGetSetDescrObject*>(grad.ptr())->d_getset;
  }
  torch.device_type = cuda_kind().dlpack;
  torch.tensor_type = tensor_type.release().ptr();
  torch.parameter_type = parameter_type.release().ptr();
}

PyObject* read_grad(PyObject* param) {
  // Asking the descriptor itself spares the look-up through the type's bases.
  PyObject* grad = is_exact(param) && torch.grad != nullptr
                       ? torch.grad->get(param, torch.grad->closure)
                       : PyObject_GetAttrString(param, "grad");
  if (grad == nullptr) throw py::error_already_set();
  return grad;
}

void drop_grad(PyObject* param) {
  const int failed = is_exact(param) && torch.grad != nullptr
                         ? torch.grad->set(param, Py_None, torch.grad->closure)
                         : PyObject_SetAttrString(param, "grad", Py_None);
  if (failed != 0) throw py::error_already_set();
}

Reading read_tensor(PyObject* object, View* view) {
  if (!is_plain(object)) return Reading::kOther;
  dlpack::Tensor t;
  if (torch.api->view(object, &t) != 0) {  // sparse, meta, quantized, ...
    PyErr_Clear();
    return Reading::kOther;
  }
  if (t.device.type == dlpack::kCPU || t.device.type == dlpack::kPinnedHost) {
    view->device = kHost;
  } else if (t.device.type == torch.device_type) {
    view->device = t.device.id;
  } else {
    return Reading::kDevice;
  }
  view->complex = t.dtype.code == dlpack::kComplex;
  const int bits = view->complex ? t.dtype.bits / 2 : t.dtype.bits;
  if (!find_dtype(t.dtype.code, bits, &view->dtype)) return Reading::kDType;
  view->data = static_cast<char*>(t.data) + t.byte_offset;
  view->ndim = t.ndim;
  view->size = t.shape;
  view->stride = t.strides;
  if (t.data == nullptr && count(*view) > 0) return Reading::kOther;  // no memory behind it
  return Reading::kOk;
}

int64_t* read_integer(PyObject* object) {
  View view;
  const bool ok = read_tensor(object, &view) == Reading::kOk && view.device == kHost &&
                  view.dtype == DType::kInt64 && !view.complex && count(view) == 1;
  return ok ? reinterpret_cast<int64_t*>(view.data) : nullptr;
}

void* current_stream(int device) {
  void* stream = nullptr;
  if (torch.api->current_stream(torch.device_type, device, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

bool is_negated(PyObject* tensor) { return asks(tensor, "is_neg"); }

bool is_lazy(PyObject* tensor) { return asks(tensor, "is_conj") || is_negated(tensor); }

std::string text_of(PyObject* object) {
  const py::str text{py::handle(object)};
  const auto bytes = py::reinterpret_steal<py::object>(
      PyUnicode_AsEncodedString(text.ptr(), "utf-8", "backslashreplace"));
  if (!bytes) throw py::error_already_set();
  return {PyBytes_AS_STRING(bytes.ptr()), size_t(PyBytes_GET_SIZE(bytes.ptr()))};
}

std::string shape_text(const View& view) {
  std::string text = "(";
  for (int d = 0; d < view.ndim; ++d) text += (d ? ", " : "") + std::to_string(view.size[d]);
  return text + ")";
}

}  // namespace fusedopt
