"""Checkpoint keys are TorchRec's."""

from dlrm_deploy.model.keys import dense_shapes, table_key, table_shapes
from dlrm_deploy.presets import preset


def test_kaggle_has_torchrecs_keys_and_the_published_shapes():
    config = preset("kaggle")
    assert dense_shapes(config) == {
        "dense_arch.model._mlp.0._linear.weight": (512, 13),
        "dense_arch.model._mlp.0._linear.bias": (512,),
        "dense_arch.model._mlp.1._linear.weight": (256, 512),
        "dense_arch.model._mlp.1._linear.bias": (256,),
        "dense_arch.model._mlp.2._linear.weight": (64, 256),
        "dense_arch.model._mlp.2._linear.bias": (64,),
        "dense_arch.model._mlp.3._linear.weight": (16, 64),
        "dense_arch.model._mlp.3._linear.bias": (16,),
        "over_arch.model.0._mlp.0._linear.weight": (512, 367),
        "over_arch.model.0._mlp.0._linear.bias": (512,),
        "over_arch.model.0._mlp.1._linear.weight": (256, 512),
        "over_arch.model.0._mlp.1._linear.bias": (256,),
        "over_arch.model.1.weight": (1, 256),
        "over_arch.model.1.bias": (1,),
    }
    key = "sparse_arch.embedding_bag_collection.embedding_bags.t_cat_2.weight"
    assert table_key("t_cat_2") == key
    assert table_shapes(config)[key] == (10131227, 16)


def test_cross_layers_stand_between_bottom_and_top():
    shapes = dense_shapes(preset("mlperf-v2"))
    cross = {key: shape for key, shape in shapes.items() if key.startswith("inter_arch")}
    assert list(cross.items())[:3] == [
        ("inter_arch.crossnet.W_kernels.0", (27 * 128, 512)),
        ("inter_arch.crossnet.V_kernels.0", (512, 27 * 128)),
        ("inter_arch.crossnet.bias.0", (27 * 128,)),
    ]
    assert len(cross) == 9
    assert shapes["over_arch.model.0._mlp.0._linear.weight"] == (1024, 27 * 128)
