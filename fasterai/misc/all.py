"Everything public: `from fasterai.misc.all import *`"
from fasterai.core.modules import *
from fasterai.core.batches import *
from fasterai.core.digits import *
from fasterai.lowrank.calibrate import *
from fasterai.lowrank.factorize import *
from fasterai.lowrank.latency import *
from fasterai.lowrank.ranks import *
from fasterai.lowrank.plan import *
from fasterai.misc.fc_decomposer import *
from fasterai.lowrank.report import *
from fasterai.lowrank.learner import *
from fasterai.lowrank.checkpoint import *
from fasterai.lowrank.cli import *
from fasterai.cli import *
