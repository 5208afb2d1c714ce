"""The settings of every command, one frozen dataclass each; `config_files.py` reads them from files.

Everything about a setting is said here and only here: its type, default and description, what it changes, and which
engines have it (`settings.py`). Options, config files and fingerprints follow from that. A value is validated in
`__post_init__`, so that Python users are checked as flags are.
To add a setting, add a field, and its check where not every value will do.
"""

from expo.config.engines import EngineConfig as EngineConfig
from expo.config.pair import (
    PAIR_SETTINGS as PAIR_SETTINGS,
    CommandConfig as CommandConfig,
    CommonConfig as CommonConfig,
    Dtype as Dtype,
    ExtrapolateConfig as ExtrapolateConfig,
    InspectConfig as InspectConfig,
    PairConfig as PairConfig,
    ThetaConfig as ThetaConfig,
)
from expo.config.rows import (
    DEFAULT_BETA as DEFAULT_BETA,
    DEFAULT_REWARD_MODEL as DEFAULT_REWARD_MODEL,
    Bos as Bos,
    GenerateConfig as GenerateConfig,
    RowsConfig as RowsConfig,
    ScoreConfig as ScoreConfig,
)
from expo.config.runs import CompareConfig as CompareConfig, ReportConfig as ReportConfig, RunsConfig as RunsConfig
from expo.config.sampling import DEFAULT_TEMPERATURE as DEFAULT_TEMPERATURE, SamplingConfig as SamplingConfig
from expo.config.sweep import GRID as GRID, SweepConfig as SweepConfig

COMMANDS: dict[str, type[CommandConfig]] = {
    "extrapolate": ExtrapolateConfig,
    "generate": GenerateConfig,
    "inspect": InspectConfig,
    "score": ScoreConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
    "sweep": SweepConfig,
}
