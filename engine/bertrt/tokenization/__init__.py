"""WordPiece tokenisation: text in, token ids out, the same ids as transformers' ``BertTokenizerFast``."""

from bertrt.tokenization.files import TOKENIZER_FILES
from bertrt.tokenization.settings import TokenizerSettings
from bertrt.tokenization.windows import Encoded, Overflow
from bertrt.tokenization.wordpiece import WordPieceTokenizer

__all__ = ["TOKENIZER_FILES", "Encoded", "Overflow", "TokenizerSettings", "WordPieceTokenizer"]
