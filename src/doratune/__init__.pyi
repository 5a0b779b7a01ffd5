"""The public names for type checkers and editors; at run time `__init__.py` loads them on first use."""

from . import analysis as analysis
from . import baselines as baselines
from . import bases as bases
from . import bench as bench
from . import checkpoint as checkpoint
from . import comparison as comparison
from . import data as data
from . import directions as directions
from . import evaluation as evaluation
from . import export as export
from . import formats as formats
from . import generation as generation
from . import layers as layers
from . import math as math
from . import peft as peft
from . import report as report
from . import training as training
from .adapter.attach import adapters as adapters
from .adapter.attach import attach as attach
from .adapter.attach import detach as detach
from .adapter.attach import refresh as refresh
from .adapter.combine import combine as combine
from .adapter.combine import strength as strength
from .adapter.groups import parameter_groups as parameter_groups
from .adapter.inspect import inspect as inspect
from .adapter.merge import merge as merge
from .adapter.merge import unmerge as unmerge
from .adapter.merged_state import merged_state_dict as merged_state_dict
from .adapter.routes import disabled as disabled
from .adapter.routes import mixed as mixed
from .adapter.several import delete as delete
from .adapter.several import names as names
from .adapter.several import use as use
from .adapter.verify import verify as verify
from .checkpoint import load as load
from .checkpoint import save as save
from .config import AdapterConfig as AdapterConfig
from .errors import UserError as UserError
from .training.peft_view import as_peft as as_peft

__version__: str
