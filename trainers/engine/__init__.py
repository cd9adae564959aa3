"""The engine: a `Task`, settings and Parquet in; a trained `model/` out. The only room that knows Ray Train and DeepSpeed.

task.py      what a task says of itself        settings.py  TrainerConfig
data.py      rows by number, from large and small data sets      order.py  which rows make which step
loop.py      one worker's training             plain.py, sharded.py  how a step is taken: PyTorch alone, or DeepSpeed
run.py       `fit`: workers, failures, resume, export            dry.py   `dry_run`: one batch through it all
watch.py     nodes about to be taken away                        patches.py   what is put right in Ray's insides
"""

from trainers.engine.data import Data
from trainers.engine.dry import Seen, dry_run
from trainers.engine.run import Fitted, fit
from trainers.engine.settings import Resources, TrainerConfig
from trainers.engine.task import Batch, Task, total

__all__ = ["Batch", "Data", "Fitted", "Resources", "Seen", "Task", "TrainerConfig", "dry_run", "fit", "total"]
