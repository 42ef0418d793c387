"""The scan of unlabeled images: is such a pile poisoned? Asked before any training.

`sources` reads images, `screens` score them, `chunks` is the work on a part of them and what comes of it, `keeping` its
results on disk, `comparison` the arithmetic of the verdict, `drill` the measured power, and `scan` all of it in order.
"""
