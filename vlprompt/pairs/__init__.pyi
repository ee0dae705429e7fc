from vlprompt.pairs.features import caption_features as caption_features
from vlprompt.pairs.features import image_features as image_features
from vlprompt.pairs.load import Pair as Pair
from vlprompt.pairs.load import load_pairs as load_pairs
