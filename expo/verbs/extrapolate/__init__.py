"""`expo extrapolate`: write θ(α) = θ_dpo + α(θ_dpo − θ_sft) as a checkpoint.

`plan.py` decides everything from headers, `write.py` is a loop over shards and pieces, `commit.py` adds the files
beside the shards and joins parts, `job.py` is the whole. The arithmetic is in `theta/`, staging and committing files in
`output/writer.py`, the manifest and model card in `output/manifest.py`.
"""

from expo.verbs.extrapolate.job import Extrapolated as Extrapolated, Written as Written, run as run
from expo.verbs.extrapolate.plan import ExtrapolatePlan as ExtrapolatePlan, plan as plan
