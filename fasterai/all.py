"What users type: `from fasterai.all import *`, or `from fasterai.misc.all import *`. Everything else is imported from its room."
from fasterai.cli import fasterai_decompose
from fasterai.core.batches import Batches, run_batches
from fasterai.core.calibrate import Calibration, calibrate
from fasterai.core.digits import digits_dls
from fasterai.core.distill import SelfDistillation, SoftTargets
from fasterai.core.latency import LatencyTable
from fasterai.core.modules import LowRankHead, LowRankLinear, count_params, find_linears, is_pair
from fasterai.core.plan import Plan
from fasterai.core.report import ModelComparison, compare_models, plot_tradeoff
from fasterai.core.store import load_compressed, save_compressed
from fasterai.core.weights import load_weights
from fasterai.export.cli import fasterai_export
from fasterai.export.int8 import quantize_onnx
from fasterai.export.onnx import export_onnx
from fasterai.export.runtime import ONNXModel, load_onnx_learner
from fasterai.fold.plan import FoldPlan
from fasterai.lowrank.checkpoint import decompose_checkpoint, load_decomposed
from fasterai.lowrank.decide import make_plan, plot_spectra
from fasterai.lowrank.factorize import break_even, factorize
from fasterai.lowrank.plan import DecompositionPlan, LayerPlan, to_dense
from fasterai.lowrank.ranks import Energy, FixedRank, ParamBudget, PerLayer, Policy, RankRatio, mk_policy
from fasterai.lowrank.refine import refine
from fasterai.lowrank.search import RankSuggestion, rank_find
from fasterai.lowrank.svd import spectrum
from fasterai.misc.bn_folder import BN_Folder
from fasterai.misc.fc_decomposer import FC_Decomposer
from fasterai.prune.compensate import compensate
from fasterai.prune.cost import count_macs
from fasterai.prune.plan import PruningPlan
from fasterai.prune.pruner import Pruner
from fasterai.prune.training import PruneCallback
from fasterai.quantize.checkpoint import load_quantized, quantize_checkpoint
from fasterai.quantize.formats import Half, Int
from fasterai.quantize.layers import QuantLinear, unpack
from fasterai.quantize.plan import QuantizationPlan
from fasterai.quantize.policies import ByteBudget
from fasterai.quantize.quantizer import Quantizer
from fasterai.quantize.training import QuantizeTraining
from fasterai.sparse.sparsifier import Sparsifier
from fasterai.sparse.storage import load_sparse, save_sparse
from fasterai.sparse.training import SparsifyCallback
from fasterai.workflow.chain import compress
# methods of the Learner
import fasterai.export.learner as _export, fasterai.fold.learner as _fold, fasterai.lowrank.learner as _lowrank
import fasterai.prune.learner as _prune, fasterai.quantize.learner as _quantize, fasterai.sparse.learner as _sparse
import fasterai.workflow.learner as _workflow
