"""What ``vlprompt COMMAND --help`` prints, one text per command."""

TRAIN_HELP = """\
vlprompt train --config FILE [--a.b VALUE ...] [--metrics A,B] [--print-config] [--dry-run] [--force]

Trains a method, evaluates it, and saves config, head and results in a run folder. The same command resumes an
unfinished run and shows a finished one.

  --config FILE     a method's recipes (mocoop, mocoop/dtd) or a file of yours; several, or A+B: later files win
  --a.b VALUE       overrides a key of the files, in any position; lists as '[1, 2]', no value as null
  --metrics A,B     show these metrics, a table each: accuracy, mean_per_class, top5, ece, precision, recall, f1; with
                    several labels per image: map, map_11point, cp, cr, cf1, of1
  --print-config    print every value with its source and stop
  --dry-run         print shapes, parameters, memory and steps and stop
  --force           train again even if the run is finished; the earlier run is moved to FOLDER.old-1

Example: vlprompt train --config mocoop/demo --data.shots 4 --recipe.epochs 5
"""
BASE_TO_NEW_HELP = """\
vlprompt base-to-new --config FILE [--config FILE2 ...] [--datasets NAME,NAME2] [--seeds 1,2,3] [--a.b VALUE ...]
                     [--metrics A,B] [--dry-run] [--print-config] [--force]

Trains on the base classes with each seed, evaluates base and new classes, and prints accuracies, their harmonic mean
and zero-shot. Several --config files are compared side by side; the overrides apply to all of them.

  --config FILE     a method's recipes (mocoop, mocoop/dtd) or a file of yours; A+B: the values of B over those of A
  --datasets A,B    run every configuration on each of these data sets (group:NAME for a group of them), and add the
                    average: its H is the harmonic mean of the averages, as in published tables
  --seeds 1,2,3     the seeds (default 1,2,3)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --metrics A,B     show these metrics, a table each: accuracy, mean_per_class, top5, ece, precision, recall, f1; with
                    several labels per image: map, map_11point, cp, cr, cf1, of1
  --dry-run         print the plan, a line per training with the values that differ, and stop; needs no data
  --print-config    print the resolved configurations and stop
  --force           run finished runs again; the earlier ones are moved to FOLDER.old-1

Example: vlprompt base-to-new --config coop/demo --config mocoop/demo --seeds 1
"""
DOMAINS_HELP = """\
vlprompt domains --config FILE [--config FILE2 ...] --protocol leave-one-out|single-source [--seeds 1,2,3]
                 [--metrics A,B] [--a.b VALUE ...] [--dry-run] [--print-config] [--force]

Domain generalisation: trains on some domains of a data set and tests on the others and their corrupted versions, with
each seed, and prints the accuracy on every domain and their mean, with zero-shot. Several --config files are compared
side by side; the overrides apply to all of them. Chosen domains for one run: vlprompt train --data.source '[A, B]'
--data.target '[C]'.

  --config FILE     a method's recipes (mocoop, mocoop/pacs) or a file of yours; its data set must have domains
  --protocol P      leave-one-out: once per domain, trained on all the others and tested on it;
                    single-source: once per domain, trained on it alone and tested on all the others
  --seeds 1,2,3     the seeds (default 1,2,3)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --metrics A,B     show these metrics, a table each: accuracy, mean_per_class, top5, ece, precision, recall, f1; with
                    several labels per image: map, map_11point, cp, cr, cf1, of1
  --dry-run         print the plan, a line per training with the values that differ, and stop; needs no data
  --print-config    print the resolved configurations and stop
  --force           run finished runs again; the earlier ones are moved to FOLDER.old-1
"""
EVAL_HELP = """\
vlprompt eval RUN [--data.name NAME] [--data.root DIR] [--data.classes all|base|new] [--data.* VALUE] [--seed N]
              [--backbone.KEY VALUE ...] [--device cpu] [--workers 4] [--metrics A,B]
vlprompt eval --protocol NAME --config FILE [--config FILE2 ...] [--seeds 1,2,3] [--datasets A,B] [--targets C,D]
              [--shots 1,2,4] [--metrics A,B] [--a.b VALUE ...] [--dry-run] [--print-config] [--force]

The first form evaluates a saved head on the test images of the run's data set, or of the one in --data.*.

  RUN               a run folder, or a head folder (then --data.name is needed); a folder of images has the split that
                    the run kept in split.json, and later images join it; test images that the head was trained on are
                    refused, known by their content for up to 256 MB of your own images
  --backbone.KEY VALUE
                    name, pretrained or precision of the backbone, if its weights are in another place than the head
                    says; their content must be that of the training
  --device D        auto (a GPU if there is one, the default), cpu or cuda
  --workers N       loader processes, as --data.workers
  --metrics A,B     print these metrics, named as in the second form

The second form trains and tests under a protocol of the papers, prints a table and writes a JSON file next to the runs.
Finished runs are reused; the same command resumes where it stopped. Several --config files are compared side by side.

  --protocol NAME   `vlprompt list protocols` shows them: few-shot, base-to-new, cross-dataset, imagenet-domains,
                    per-target, leave-one-out, single-source, test-time; or a file of yours, my.yaml, with the same
                    fields
  --config FILE     a method's recipes (mocoop, mocoop/dtd) or a file of yours; A+B: the values of B over those of A
  --datasets A,B    data sets to train on, instead of the protocol's; group:NAME for all data sets of a group
  --targets C,D     other data sets to test on (cross-dataset, imagenet-domains); a method that learns from no labelled
                    images runs on each of them by itself, with the values for it
  --shots 1,2,4     training images per class; several only for few-shot
  --seeds 1,2,3     the seeds (default: the protocol's)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --metrics A,B     show these metrics, a table each: accuracy, mean_per_class, top5, ece, precision, recall, f1; with
                    several labels per image: map, map_11point, cp, cr, cf1, of1
  --dry-run         print the plan, a line per training with the values that differ, and stop; needs no data
  --print-config    print the resolved configurations and stop
  --force           run finished runs again; the earlier ones are moved to FOLDER.old-1

Example: vlprompt eval RUN --data.classes new
Example: vlprompt eval --protocol cross-dataset --config coop/demo --targets demo-2,demo-3 --seeds 1
"""
SEARCH_HELP = """\
vlprompt search --config FILE --grid KEY=VALUE,VALUE [--grid KEY2=VALUE,VALUE ...] [--on val|test] [--oracle]
                [--metrics A,B] [--a.b VALUE ...] [--print-config] [--force]

Trains every candidate of a grid, chooses the best on the validation images (the first of equal candidates), and tests
only that one. The same command resumes where it stopped. Runs, selection (selection.json) and best configuration
(best.yaml) are saved in OUTPUT/search-...; use best.yaml for other seeds and protocols.

  --config FILE     a method's recipes (mocoop, mocoop/dtd) or a file of yours; A+B: the values of B over those of A
  --grid KEY=A,B    values to try of recipe.*, settings.*, decomposition.NAME.*, data.transform or data.template; texts
                    with commas in quotes
  --on val|test     images to choose on (default val)
  --metrics A,B     show these metrics of the best run, a table each; the choice is by the headline metric
  --oracle          allow a selection that uses test images, because of --on test or because validation and test images
                    are the same, as on ImageNet; results and tables are then marked (oracle)
  --a.b VALUE       overrides a key; `vlprompt train --help` lists the keys
  --print-config    print the candidates' configurations and stop
  --force           train finished runs again; the earlier ones are moved to FOLDER.old-1

Example: vlprompt search --config coop/demo --grid recipe.lr=0.002,0.02 --grid recipe.epochs=5,20
"""
COMPARE_HELP = """\
vlprompt compare A B

Prints the differences between two runs: folder and content of your own images, split, class names, template, images
drawn, transforms, and also method, recipe, backbone and versions. The status is 0 if the data protocol is the same and
1 if it differs.

  A, B              run folders, or their results.json

Example: vlprompt compare runs/coop/demo/RUN runs/mocoop/demo/RUN
"""
PREDICT_HELP = """\
vlprompt predict RUN IMAGE... [--top 5] [--scores probability|cosine] [--unknown T] [--backbone.KEY VALUE ...]
                 [--data.orientation tag|ignore] [--data.background COLOUR] [--device cpu] [--workers 4] [--json]

Prints the most probable classes of image files, or of all images in folders. Images are turned as their orientation
tags say, and transparent pixels are white, unless the head was trained on your own images read in another way. Files of
folders that are no images are counted.

  RUN               a run folder or a head folder
  IMAGE...          image files or folders
  --top K           classes to show per image (default 5)
  --scores S        probability (default): a softmax over the classes of the head, which says which of them fits best;
                    cosine: that of image and class, which depends on no other class (with CLIP often 0.2 to 0.4 for
                    a class that fits); not for caches, whose scores are more than cosines
  --unknown T       the answer is "unknown" for images with a best score below T, 0 to 1 (cosines: -1 to 1); a column
                    "answer" shows it, and --json adds "unknown": true or false to every image
  --backbone.KEY VALUE
                    name, pretrained or precision of the backbone, if its weights are in another place than the head
                    says: --backbone.name local-dir:/models/mine; their content must be that of the training
  --data.orientation tag|ignore
                    turn images as their orientation tags say, or ignore the tags
  --data.background COLOUR
                    white, black or '#rrggbb' behind transparent pixels, or none for the colours that are stored there
  --device D        auto (a GPU if there is one, the default), cpu or cuda
  --workers N       threads that read images (default 0: the program itself)
  --json            print [{"path": ..., "classes": [{"name": ..., "probability": ...}]}], or "cosine": ...
"""
LIST_HELP = """\
vlprompt list methods|objectives|decompositions|datasets|backbones|protocols [PATTERN] [--names] [--markdown]

Prints names, one per line; PATTERN is a wildcard such as '*coop*'. Methods are a table of what they learn and need,
counted on ViT-B/16; --names prints only names, --markdown the table of the README.
"""
