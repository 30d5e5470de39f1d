"""VIPSeg (Miao et al., CVPR 2022): the 124 classes of VSPW with instances, in 3,536 videos at 5 frames a second."""

from mmseg.registry import DATASETS

from .layout import Layout
from .vspw import VSPWDataset


@DATASETS.register_module()
class VIPSeg(VSPWDataset):
    """``{train,val,test}.txt``, ``imgs/<video>/*.jpg``, ``panomasks/<video>/*.png``.

    Masks hold 0 for void, 1..124 for stuff, and 100 times the class plus the number of the instance for things.
    """

    layout = Layout(frames='imgs/{video}', masks='panomasks/{video}')
    decoder = 'vipseg'
