// The DLPack C exchange API, as much of it as we use: how a tensor of any framework is looked at
// from C without that framework's headers. torch publishes a table of these functions as the
// capsule torch.Tensor.__dlpack_c_exchange_api__ from 2.10 on.
//
// Field order and types follow the DLPack specification, major version 1; a different major
// version may differ and is refused.
#pragma once

#include <stdint.h>

namespace fusedopt::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

struct Version {
  uint32_t major;
  uint32_t minor;
};

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kPinnedHost = 3 };

struct Device {
  int32_t type;
  int32_t id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kComplex = 5 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null stands for row-major
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  // Fills in a view that is valid while the tensor is not changed. 0, or -1 with a Python
  // exception set. Traps: a lazily conjugated or negated tensor is described as if it were not;
  // a wrapper subclass (DTensor) shows a pointer that is not its data.
  int (*view)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace fusedopt::dlpack
