// The file that setup.py writes for an extension.
#define CRSAM_VERSION ""
#define CRSAM_REVISION ""
#define CRSAM_TORCH ""
#define CRSAM_CUDA ""
#define CRSAM_ARCHITECTURES ""
#define CRSAM_WITH_KERNELS
