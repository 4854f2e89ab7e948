// Marks functions that the CPU and the GPU share.
#pragma once

#ifdef __CUDACC__
#define SOD_DEVICE __host__ __device__ __forceinline__
#else
#define SOD_DEVICE inline
#endif
