"""Ways to the Fisher trace and diagonal of every layer, ours and what others have.

| name | class | exact | how |
|---|---|---|---|
| `plain` | `Plain` | – | forward and backward, the reference of all ratios |
| `ours` | `Ours` | yes | this package |
| `loop` | `Loop` | yes | batches of one sample |
| `vmap` | `Vmap` | yes | `torch.func.vmap(grad)` over `functional_call` |
| `hooks` | `Hooks` | yes | plain torch: batched products, no weight gradients |
| `backpack` | `BackPack` | yes | BackPACK: `BatchL2Grad`, `SumGradSquared` |
| `opacus` | `Opacus` | yes | Opacus' ghost norms; trace only |
| `curvlinops` | `Curvlinops` | no | one Hutchinson probe of the empirical Fisher |
| `shortcut` | `Shortcut` | no | B times the square of the batch's mean gradient |

All of them want gradients of layers' weights only; biases and norms are left out where
a method lets them be. What a library needs to be set up once is not timed.
"""

from fisher_peers.candidate import Candidate
from fisher_peers.case import NETWORKS, Case, build, tiny
from fisher_peers.gradients import Loop, Ours, Plain, Shortcut
from fisher_peers.hooks import Hooks
from fisher_peers.libraries import BackPack, Curvlinops, Opacus
from fisher_peers.reference import reference
from fisher_peers.vmap import Vmap

__all__ = [
    "CANDIDATES",
    "NETWORKS",
    "BackPack",
    "Candidate",
    "Case",
    "Curvlinops",
    "Hooks",
    "Loop",
    "Opacus",
    "Ours",
    "Plain",
    "Shortcut",
    "Vmap",
    "build",
    "reference",
    "tiny",
]

CANDIDATES: dict[str, type[Candidate]] = {
    "plain": Plain,
    "ours": Ours,
    "loop": Loop,
    "vmap": Vmap,
    "hooks": Hooks,
    "backpack": BackPack,
    "opacus": Opacus,
    "curvlinops": Curvlinops,
    "shortcut": Shortcut,
}
