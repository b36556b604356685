// What the loader asks of an object: what it was built from, and what a status means.
#include <cuda_runtime.h>

#define TEXT(token) #token
#define EXPANDED(macro) TEXT(macro)

// "sm_90a_" and the hash of the sources, so that an object of other sources is refused instead of miscalled.
extern "C" const char* quamba_identity() { return EXPANDED(QUAMBA_IDENTITY); }

extern "C" const char* quamba_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
