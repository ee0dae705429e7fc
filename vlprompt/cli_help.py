"""What ``vlprompt COMMAND --help`` prints, one text per command."""

TRAIN_HELP = """\
vlprompt train --config FILE [--a.b VALUE ...] [--print-config] [--dry-run] [--force]

Trains a method, evaluates it, and keeps config, head and results in a run folder. The same command resumes an
unfinished run and shows a finished one.

  --config FILE     a path, or one of vlprompt's own such as mocoop/demo; several files: later ones win
  --a.b VALUE       overrides a key of the files, wherever it stands; lists as '[1, 2]', nothing as null
  --print-config    print the resolved configuration and stop
  --dry-run         print shapes, learnables, memory and steps and stop
  --force           train again although the run is finished

Example: vlprompt train --config mocoop/demo --data.shots 4 --recipe.epochs 5
"""
BASE_TO_NEW_HELP = """\
vlprompt base-to-new --config FILE [--config FILE2 ...] [--datasets NAME,NAME2] [--seeds 1,2,3] [--a.b VALUE ...]
                     [--print-config] [--force]

Trains on the base classes with each seed, evaluates base and new classes, and prints accuracies, their harmonic mean
and zero-shot. Several --config files are compared side by side; the overrides apply to all of them.

  --config FILE     a path, or one of vlprompt's own such as mocoop/demo
  --datasets A,B    run every configuration on each of these data sets, and add the average over them: H of the
                    average is the harmonic mean of the averages, as in published tables
  --seeds 1,2,3     the seeds (default 1,2,3)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --print-config    print the resolved configurations and stop
  --force           run again what is finished

Example: vlprompt base-to-new --config coop/demo --config mocoop/demo --seeds 1
"""
DOMAINS_HELP = """\
vlprompt domains --config FILE [--config FILE2 ...] --protocol leave-one-out|single-source [--seeds 1,2,3]
                 [--a.b VALUE ...] [--print-config] [--force]

Domain generalisation: trains on some domains of a data set and tests on the others and their corrupted versions, with
each seed, and prints the accuracy on every domain and their mean, beside zero-shot. Several --config files are compared
side by side; the overrides apply to all of them. Chosen domains for one run: vlprompt train --data.source '[A, B]'
--data.target '[C]'.

  --config FILE     a path, or one of vlprompt's own; its data set has to have domains
  --protocol P      leave-one-out: once per domain, trained on all the others and tested on it;
                    single-source: once per domain, trained on it alone and tested on all the others
  --seeds 1,2,3     the seeds (default 1,2,3)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --print-config    print the resolved configurations and stop
  --force           run again what is finished
"""
EVAL_HELP = """\
vlprompt eval RUN [--data.name NAME] [--data.root DIR] [--data.classes all|base|new] [--data.* VALUE] [--seed N]

Evaluates a saved head on the test images of a data set: the run's own, unless --data.* says otherwise.

  RUN               a run folder, or a head folder (then --data.name is needed)

Example: vlprompt eval RUN --data.classes new
"""
PREDICT_HELP = """\
vlprompt predict RUN IMAGE... [--top 5] [--json]

Prints the most probable classes of image files, or of all images in folders.

  RUN               a run folder or a head folder
  IMAGE...          image files or folders
  --top K           classes to show per image (default 5)
  --json            print [{"path": ..., "classes": [{"name": ..., "probability": ...}]}]
"""
LIST_HELP = """\
vlprompt list methods|datasets|backbones [PATTERN]

Prints names, one per line; PATTERN is a wildcard such as '*coop*'.
"""
