// What the fake device's driver (fake_device.cpp) does for the emulated kernels
// (emulated_cuda.cpp).
#pragma once

#include <cstdint>
#include <functional>

struct FakeDriver {
  // Does some work on a device: now, or at each replay of the graph that the stream records.
  void (*launch)(void* stream, std::function<void()> work);

  // The number of the graph that a stream records; 0: none.
  uint64_t (*capture)(void* stream);

  // Calls release(what), on another thread, when the graph that the stream records is gone.
  void (*retain)(void* stream, void (*release)(void*), void* what);

  // A stream of the device's that records no graph.
  void* (*stream_outside_graphs)(int device);

  // Whether this thread may allocate memory, but for the graph's, while a graph is recorded.
  // Returns whether it might before.
  bool (*allow_in_capture)(bool allow);
};
