"""Clients of the prediction server, for programs: `CifarClient("http://127.0.0.1:8000").predict(images)`.

`CifarClient` and its async twin `AsyncCifarClient` have the same methods. What both do alike is said once, without I/O:
`pictures` makes bytes of what a caller has, `exchange` forms requests and reads replies. The two classes only send.
"""

from ml.client.asynchronous import AsyncCifarClient
from ml.client.exchange import BATCH, Prediction
from ml.client.pictures import Image, Images
from ml.client.synchronous import CifarClient

__all__ = ["BATCH", "AsyncCifarClient", "CifarClient", "Image", "Images", "Prediction"]
