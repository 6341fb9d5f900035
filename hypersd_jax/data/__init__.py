"""Image-text data: the embedded emoji art, sets of the user's own, prompts alone, and loading ahead."""

from hypersd_jax.data.emoji import COLOURS as COLOURS
from hypersd_jax.data.emoji import EmojiRecord as EmojiRecord
from hypersd_jax.data.emoji import EmojiSet as EmojiSet
from hypersd_jax.data.emoji import caption as caption
from hypersd_jax.data.emoji import composite as composite
from hypersd_jax.data.emoji import load_emoji as load_emoji
from hypersd_jax.data.emoji import split_of as split_of
from hypersd_jax.data.emoji_source import EmojiSource as EmojiSource
from hypersd_jax.data.emoji_source import EvalItem as EvalItem
from hypersd_jax.data.emoji_source import evaluation_images as evaluation_images
from hypersd_jax.data.emoji_source import evaluation_list as evaluation_list
from hypersd_jax.data.image_text import ImageTextSource as ImageTextSource
from hypersd_jax.data.opening import open_prompts as open_prompts
from hypersd_jax.data.opening import open_source as open_source
from hypersd_jax.data.prefetch import prefetch as prefetch
from hypersd_jax.data.prompts import PromptSource as PromptSource
from hypersd_jax.data.source import Batch as Batch
from hypersd_jax.data.source import Prompts as Prompts
from hypersd_jax.data.source import Source as Source
from hypersd_jax.data.source import signed as signed
