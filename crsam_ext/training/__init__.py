"""``crsam-train``: train image classifiers with CR-SAM, and with SAM and the base optimizer to compare.

======================  ==========================================================
``options``             the command line, and the defaults of each data set
``data``                data sets, and the batches of an epoch
``images``              folders of images: which files are the data
``models``              models for small inputs, CIFAR networks, everything in timm
``loop``                epochs: train, evaluate, log, save, resume
``checkpoint``          atomic files, random states, loading with checks
``plot``                the picture of a run
``__main__``            errors and Ctrl-C to exit codes
======================  ==========================================================
"""
