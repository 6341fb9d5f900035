"""Images and text of users' files, read by one rule wherever they come from."""

from hypersd_jax.files.images import IMAGE_ENDINGS as IMAGE_ENDINGS
from hypersd_jax.files.images import UNREAD_ENDINGS as UNREAD_ENDINGS
from hypersd_jax.files.images import image_size as image_size
from hypersd_jax.files.images import is_readable as is_readable
from hypersd_jax.files.images import read_image as read_image
from hypersd_jax.files.images import read_mask as read_mask
from hypersd_jax.files.text import decoded as decoded
from hypersd_jax.files.text import lines_of as lines_of
from hypersd_jax.files.text import read_prompts as read_prompts
