from vlprompt.data.features import FeatureStore as FeatureStore
from vlprompt.data.features import extract as extract
from vlprompt.data.module import FewShotData as FewShotData
from vlprompt.data.samplers import EvalSampler as EvalSampler
from vlprompt.data.samplers import TrainSampler as TrainSampler
from vlprompt.data.transforms import describe_transform as describe_transform
from vlprompt.data.transforms import test_transform as test_transform
from vlprompt.data.transforms import train_transform as train_transform
