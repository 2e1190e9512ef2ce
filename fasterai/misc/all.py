"The same as `fasterai.all`: `from fasterai.misc.all import *`"
from fasterai.all import *

# Names of 0.1.0 that are internals now: `from fasterai.misc.all import gram` still works, a star no longer brings them.
_ROOMS = {'core.arguments': 'model_args', 'core.batches': 'left_as_found', 'core.calibrate': 'LayerStats',
    'core.collect': 'MAX_DENSE_SENS NotDifferentiable Sensitivity', 'core.files': 'write_atomic', 'core.modules': 'LinearSite match_name mk_pair select',
    'core.readers': 'LINEAR_ATTRS weight_readers', 'core.sums': 'oas_shrinkage', 'core.surgery': 'copy_with', 'core.weights': 'build_arch',
    'lowrank.cli': 'disk_bytes run_example write_result', 'lowrank.factorize': 'Basis DAMPING RIDGE balance shifted_bias',
    'lowrank.ranks': 'BudgetSolution Layer LayerPolicy round_rank', 'lowrank.search': 'RATIOS',
    'lowrank.svd': 'KRYLOV_BELOW SVD_BELOW Solver gram pick_solver residual trunc_error'}

def __getattr__(name: str):
    from importlib import import_module
    for room,names in _ROOMS.items():
        if name in names.split(): return getattr(import_module(f'fasterai.{room}'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
