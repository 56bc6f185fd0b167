"""``crsam-train``: train image classifiers with CR-SAM, and with SAM or the base optimizer for comparison.

======================  ==============================================================================================
``__main__``            the program: runs a command, and turns errors and Ctrl-C into one line and an exit code
``options``             the command line, and the default options of each data set
``recipes``             options from YAML files, and the recipes that are shipped
``errors``              the exceptions that end a run
``prepare``             ``crsam-train prepare``: shrink the images of a data set once
``data``                data sets, and the batches of an epoch
``images``              finds the images in folders and tar files
``synthetic``           generated images, for measurements without a data set
``decoding``            decodes images with Pillow or torchcodec, to the same pixels
``augment``             augmentation in the workers; normalization, random erasing and mixing on the device
``loader``              the worker processes that prepare batches
``randomness``          seeds as functions of epoch, sample, step and rank
``models``              small models, CIFAR networks, and all timm models
``steps``               the loss, the optimizer, and one optimizer step
``schedules``           learning rate, rho, alpha and beta of each step
``loop``                the training loop: train, evaluate, log, save, resume
``ranks``               the processes of a distributed run
``stop``                signals, and stopping all processes after the same step
``state``               the state of a run: save it, resume from it, keep the best weights
``checkpoint``          atomic file writes, and checkpoint loading with checks
``measure``             training metrics, timing, FLOPs
``profile``             ``--profile``: measure the data alone, the step alone, and both
``logs``                CSV files, TensorBoard, Weights & Biases
``plot``                the figure of loss and accuracy
``progress``            the progress bar, and lines on stdout and stderr
======================  ==============================================================================================
"""
