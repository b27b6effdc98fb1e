"""What turns gradients into steps: AdamW, and Muon for the matrices of the blocks."""
import torch


def make_optimizers(params, args, launched):
    """AdamW for all of {name: parameter}; with --muon, Muon for the blocks' matrices, which bears a rate three times as
    high."""
    def is_matrix(name):
        return args.muon and name.startswith("dit.blocks.") and name.endswith("weight") and params[name].ndim == 2
    matrices = [p for name, p in params.items() if is_matrix(name)]
    others = [p for name, p in params.items() if not is_matrix(name)]
    optimizers = [torch.optim.AdamW([dict(params=others, lr_scale=1.0)], lr=args.lr, betas=(0.9, 0.99),
                                    weight_decay=args.weight_decay, fused=launched.device.type != "mps")]
    if matrices:
        optimizers.append(Muon([dict(params=matrices, lr_scale=3.0)], lr=args.lr, weight_decay=args.weight_decay,
                               share=(launched.rank, launched.world)))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): each update is made orthogonal, so that all directions of a matrix learn alike fast.
    Its update is as long as AdamW's (Liu et al. 2025).

    The same as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but all matrices of a shape at once: on two cores
    in a third of the time, and on a GPU with a tenth of the launches. PyTorch's computes in bf16 wherever it is; this
    one in bf16 under autocast only: a CPU without instructions for bf16 takes twenty times longer in it than in fp32.

    share: (rank, world): of several processes, which hold the same gradients, each computes a share of the updates.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, share=(0, 1)):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.share = share

    @torch.no_grad()
    def step(self):
        """One step of the matrices that have a gradient; the others stay as they are."""
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for shape, matrices in alike.items():
                for p in matrices:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                gradients, averages = [p.grad for p in matrices], [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, averages, group["momentum"])           # Nesterov's
                updates = orthogonalized_in_shares(torch.stack(updates), *self.share)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalized_in_shares(x, rank, world):
    """orthogonalized(x), of which each of the processes computes a share."""
    if world == 1:
        return orthogonalized(x)
    first, last = rank * len(x) // world, (rank + 1) * len(x) // world
    share = orthogonalized(x[first:last])
    whole = share.new_zeros(x.shape)
    whole[first:last] = share
    torch.distributed.all_reduce(whole)
    return whole


def orthogonalized(x):
    """x (N, n, m) -> nearly U V^T of its singular value decompositions, by five Newton-Schulz iterations: the
    singular values end up between 0.7 and 1.2."""
    tall = x.shape[1] > x.shape[2]
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x.mT @ x if tall else x @ x.mT                                                   # the smaller of the two
        step = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, x, step, beta=3.4445) if tall else torch.baddbmm(x, step, x, beta=3.4445)
    return x
