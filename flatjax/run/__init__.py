"""Run long computations, with a folder, checkpoints, progress, options, text and tables for each."""

from flatjax.run.options import RunOptions as RunOptions
from flatjax.run.options import SeedOptions as SeedOptions
from flatjax.run.progress import Progress as Progress
from flatjax.run.records import RunFolder as RunFolder
from flatjax.run.records import write_record as write_record
