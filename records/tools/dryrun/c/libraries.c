// cuBLAS, cuBLASLt, cuSOLVER and the backend of cuDNN: matrix products are logged with their
// shapes, executed graphs of cuDNN (attention) as one kernel, everything else succeeds.
#include "dryrun.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn_backend.h>
#include <cusolverDn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// A handle is the stream that was set for it.
struct library {
    cudaStream_t stream;
};

static void *new_handle(void) { return calloc(1, 256); }

static cudaStream_t stream_of(const void *handle) {
    return handle ? ((const struct library *)handle)->stream : 0;
}

// C [m, n] = A [m, k] B [k, n], so many times; named by the type of its operands.
static void product(const void *handle, cudaDataType type, long m, long n, long k, long batch) {
    const char *name = type == CUDA_R_64F    ? "float64"
                       : type == CUDA_R_32F  ? "float32"
                       : type == CUDA_R_16BF ? "bfloat16"
                       : type == CUDA_R_16F  ? "float16"
                                             : "other";
    dryrun_launch("gemm", name, m, n, k, batch, stream_of(handle));
}

// ---- cuBLAS ----

API cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    ((struct library *)handle)->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                                int m, int n, int k, const void *alpha, const void *A,
                                cudaDataType type, int lda, const void *B, cudaDataType type_b,
                                int ldb, const void *beta, void *C, cudaDataType type_c, int ldc,
                                cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    product(handle, type, m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *A, cudaDataType type, int lda, long long sa, const void *B,
    cudaDataType type_b, int ldb, long long sb, const void *beta, void *C, cudaDataType type_c,
    int ldc, long long sc, int batch, cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
    product(handle, type, m, n, k, batch);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                                  int m, int n, int k, const float *alpha, const float *A, int lda,
                                  const float *B, int ldb, const float *beta, float *C, int ldc) {
    product(handle, CUDA_R_32F, m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasSgemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                                 int m, int n, int k, const float *alpha, const void *A,
                                 cudaDataType type, int lda, const void *B, cudaDataType type_b,
                                 int ldb, const float *beta, void *C, cudaDataType type_c,
                                 int ldc) {
    product(handle, type, m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                                  int m, int n, int k, const double *alpha, const double *A,
                                  int lda, const double *B, int ldb, const double *beta, double *C,
                                  int ldc) {
    product(handle, CUDA_R_64F, m, n, k, 1);
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t ta,
                                             cublasOperation_t tb, int m, int n, int k,
                                             const float *alpha, const float *A, int lda,
                                             long long sa, const float *B, int ldb, long long sb,
                                             const float *beta, float *C, int ldc, long long sc,
                                             int batch) {
    product(handle, CUDA_R_32F, m, n, k, batch);
    return CUBLAS_STATUS_SUCCESS;
}

// ---- cuBLASLt: a layout keeps its shape, in the library's opaque struct ----

struct layout {
    cudaDataType type;
    int batch;
    uint64_t rows, columns;
};

API cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type,
                                              uint64_t rows, uint64_t columns, int64_t stride) {
    struct layout *layout = new_handle();
    *layout = (struct layout){type, 1, rows, columns};
    *made = (cublasLtMatrixLayout_t)layout;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                    cublasLtMatrixLayoutAttribute_t attribute,
                                                    const void *value, size_t size) {
    if (attribute == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT)
        memcpy(&((struct layout *)layout)->batch, value, sizeof(int));
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute,
                                            cudaDataType scale) {
    *made = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    *made = new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
    cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
    cublasLtMatmulPreference_t preference, int wanted, cublasLtMatmulHeuristicResult_t results[],
    int *found) {
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

API cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                  const void *alpha, const void *A, cublasLtMatrixLayout_t layout_a,
                                  const void *B, cublasLtMatrixLayout_t layout_b, const void *beta,
                                  const void *C, cublasLtMatrixLayout_t layout_c, void *D,
                                  cublasLtMatrixLayout_t layout_d,
                                  const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                  size_t size, cudaStream_t stream) {
    const struct layout *a = (const struct layout *)layout_a, *d = (const struct layout *)layout_d;
    uint64_t inner =
        a->rows == d->rows ? a->columns : a->rows; // A lies there as it is, or transposed
    struct library on = {stream};
    product(&on, a->type, d->rows, d->columns, inner, d->batch);
    return CUBLAS_STATUS_SUCCESS;
}

API size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

// ---- cuSOLVER, cuDNN ----

API cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t *handle) {
    *handle = new_handle();
    return CUSOLVER_STATUS_SUCCESS;
}

API cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t *made) {
    *made = new_handle();
    return CUSOLVER_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    *handle = new_handle();
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
    ((struct library *)handle)->stream = stream;
    return CUDNN_STATUS_SUCCESS;
}

// The real library would free what it never made.
API cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) { return CUDNN_STATUS_SUCCESS; }

API cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                               cudnnBackendDescriptor_t *made) {
    *made = new_handle();
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t description) {
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t description,
                                           cudnnBackendAttributeName_t name,
                                           cudnnBackendAttributeType_t type, int64_t count,
                                           const void *values) {
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t description) {
    return CUDNN_STATUS_SUCCESS;
}

// One of everything that torch asks for (engines, configurations, plans), and 0 for all its
// properties.
API cudnnStatus_t cudnnBackendGetAttribute(const cudnnBackendDescriptor_t description,
                                           cudnnBackendAttributeName_t name,
                                           cudnnBackendAttributeType_t type, int64_t wanted,
                                           int64_t *found, void *values) {
    if (found)
        *found = 1;
    if (values && wanted && type != CUDNN_TYPE_BACKEND_DESCRIPTOR)
        memset(values, 0, 8);
    return CUDNN_STATUS_SUCCESS;
}

API cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                      cudnnBackendDescriptor_t variants) {
    dryrun_launch("kernel", "cudnnBackendExecute", 0, 0, 0, 0, stream_of(handle));
    return CUDNN_STATUS_SUCCESS;
}
