#pragma once

#include "cuda_runtime.h"

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };

// A CPU has no graphs.
inline int cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return 0;
}
