// The operators' schemas, and the version counters of what they write. `crsam_ext.ops` says what each one computes.
//
// Groups are given by number; options as one list of numbers for all groups, in the order of `Sgd` and `Adam`, and a
// list of tensors that hold some of those numbers on the device instead. With fewer than three passes, `grad` is the
// gradient of the last one, and the lists of the other two are empty. An empty tensor stands for no momentum.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

TORCH_LIBRARY(crsam, m) {
  m.def("grad_norm(Tensor[] grads, int[] groups, int num_groups, Tensor?[] weights) -> Tensor");
  m.def("perturbation_scale(Tensor squared_norm, Tensor rho, float epsilon) -> Tensor");
  m.def(
      "perturb_(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor[] grads, int[] groups, Tensor scale, bool[] adaptive, "
      "int sign, bool stochastic=False) -> ()");
  m.def(
      "fd_gram(Tensor[] grad, Tensor[] grad_ascent, Tensor[] grad_descent, int[] groups, int num_groups, "
      "Tensor?[] weights) -> Tensor");
  // Returns a, b, factor, kappa, sigma, ratio in one tensor, ok and capped in another.
  m.def(
      "coefficients(Tensor? gram, Tensor[] squared_norms, Tensor scale, Tensor alpha, Tensor beta, "
      "Tensor(a!) counters, Tensor(b!)[] taken, Tensor[] part, int passes, bool log, Tensor[] losses, "
      "Tensor? grad_scale, float max_regularizer_ratio, float max_grad_norm) -> (Tensor, Tensor)");
  m.def(
      "sgd_step_(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor(c!)[] momentum_buffer, Tensor[] grad, "
      "Tensor[] grad_ascent, Tensor[] grad_descent, int[] groups, Tensor[] steps, float[] options, "
      "Tensor?[] option_tensors, Tensor a, Tensor b, Tensor? factor, Tensor ok) -> ()");
  m.def(
      "adamw_step_(Tensor(a!)[] live, Tensor(b!)[] saved, Tensor(c!)[] exp_avg, Tensor(d!)[] exp_avg_sq, "
      "Tensor[] grad, Tensor[] grad_ascent, Tensor[] grad_descent, int[] groups, Tensor[] steps, float[] options, "
      "Tensor?[] option_tensors, Tensor a, Tensor b, Tensor? factor, Tensor ok) -> ()");
  m.def(
      "combine_(Tensor(a!)[] live, Tensor[] saved, Tensor(b!)[] grad, Tensor[] grad_ascent, "
      "Tensor(c!)[] grad_descent, int[] groups, Tensor a, Tensor b, Tensor? factor) -> ()");
}

namespace {

// Runs the operator, then bumps the version of every tensor that its schema marks as written.
void bump_versions(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto given = torch::jit::last(*stack, arguments.size());
  std::vector<at::Tensor> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].alias_info() || !arguments[i].alias_info()->isWrite()) continue;
    if (given[i].isTensor()) {
      written.push_back(given[i].toTensor());
    } else {
      for (const at::Tensor& tensor : given[i].toTensorVector()) written.push_back(tensor);
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  for (const at::Tensor& tensor : written) torch::autograd::impl::bump_version(tensor);
}

}  // namespace

TORCH_LIBRARY_IMPL(crsam, ADInplaceOrView, m) {
  for (const char* name : {"perturb_", "coefficients", "sgd_step_", "adamw_step_", "combine_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&bump_versions>());
  }
}
