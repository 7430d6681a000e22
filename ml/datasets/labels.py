"""The ten classes of CIFAR-10, in the order of their ids, and the shape of one image."""

CLASS_NAMES: tuple[str, ...] = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
NUM_CLASSES = len(CLASS_NAMES)
IMAGE_SIDE = 32
IMAGE_SHAPE: tuple[int, int, int] = (IMAGE_SIDE, IMAGE_SIDE, 3)
IMAGE_BYTES = IMAGE_SIDE * IMAGE_SIDE * 3
