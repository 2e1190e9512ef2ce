"Small models of every kind a user may bring, with random weights, and what a decomposition of each has to say"
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
import pandas as pd, timm, torch, torchvision.models as tv, transformers as hf
from fastai.data.core import DataLoaders
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config, get_language_model, get_text_classifier
from fastai.vision.all import vision_learner
from timm.models.efficientformer import Attention as EfficientAttention, EfficientFormer
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

@dataclass(frozen=True)
class Case:
    "A model, and what is expected of it"
    make: Callable                               # () -> model, inputs of one call: a tuple or a dict
    pairs: int                                   # layers that become pairs
    skipped: dict = field(default_factory=dict)  # layers that stay: name -> reason
    reads: str = ''                              # patterns of the layers whose parent reads `.weight`
    used: bool = True                            # trained for a step before it is decomposed?

ZOO = {}
def add(name, make, pairs, **kw): ZOO[name] = Case(make, pairs, **kw)
def img(size=32): return torch.randn(2, 3, size, size)   # two items: batch norm needs more than one
def ids(length=7): return torch.randint(5, 50, (2, length))
def tied(name, *others): return {name: f'tied with {", ".join(others)}'}

PACKED = 'packed q/k/v projection: a parameter, not a layer'
STACKED = 'stacked matrices: a parameter, not a layer'

# --- torchvision. The classifiers of VGG and AlexNet are narrower than the original: minutes of SVD would show nothing more
def classifier(m, *sizes):
    "Give the linear layers of `m.classifier` other sizes"
    where = [i for i,o in enumerate(m.classifier) if isinstance(o, nn.Linear)]
    for i,n,k in zip(where, sizes, sizes[1:]): m.classifier[i] = nn.Linear(n, k)
    return m

def swin(**kw): return tv.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, **kw), (img(),)
def tv_make(name, **kw): return lambda: (getattr(tv, name)(num_classes=20, **kw), (img(64),))

def vgg(): return tv.VGG(tv.vgg.make_layers([8, 'M', 16, 'M', 24, 'M'], batch_norm=True))

add('tv-vgg',     lambda: (classifier(vgg(), 24*49, 96, 64, 2), (img(),)), 3)
add('tv-alexnet', lambda: (classifier(tv.alexnet(), 256*36, 96, 64, 10), (img(64),)), 3)
for block in tv.resnet.BasicBlock, tv.resnet.Bottleneck:
    add(f'tv-resnet_{block.__name__.lower()}', lambda block=block: (tv.ResNet(block, [1,1,1,1], num_classes=20), (img(64),)), 1)
add('tv-mobilenet_v2', tv_make('mobilenet_v2'), 1)
add('tv-mobilenet_v3_small', tv_make('mobilenet_v3_small'), 2)
add('tv-convnext',  lambda: (tv.ConvNeXt([CNBlockConfig(32, 48, 1), CNBlockConfig(48, None, 1)], num_classes=10), (img(),)), 5)
add('tv-vit',       lambda: (tv.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), (img(),)), 7, reads='*.out_proj',
    skipped={f'encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight': PACKED for i in range(2)})
add('tv-swin',      swin, 18, reads='*.qkv *.proj')
add('tv-swin_v2',   partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 26, reads='*.qkv *.proj')
add('tv-maxvit',    lambda: (tv.MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=10), (img(),)), 18)

# --- timm
def tm(name, size=32, **kw): return lambda: (timm.create_model(name, num_classes=10, **kw), (img(size),))
tm_vit = partial(tm, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
tm_swin = partial(tm, img_size=32, embed_dim=24, depths=(2,2), num_heads=(2,4), window_size=4)

RESMLP = dict(mlp_ratio=4, block_layer=ResBlock, norm_layer=Affine)

def efficientformer():
    m = EfficientFormer((1,1,1,2), (16,16,24,32), num_classes=10, num_vit=1)
    for o in m.modules():  # its attention has the size of 224-pixel images built in
        if isinstance(getattr(o, 'token_mixer', None), EfficientAttention): o.token_mixer = EfficientAttention(32, resolution=2)
    return m, (img(64),)

add('timm-vit',     tm_vit('vit_tiny_patch16_224'), 9)
add('timm-deit',    tm_vit('deit_tiny_distilled_patch16_224'), 10)
add('timm-beit',    tm_vit('beit_base_patch16_224'), 9, reads='*.qkv')
add('timm-beitv2',  tm_vit('beitv2_base_patch16_224'), 9, reads='*.qkv')
add('timm-eva02',   tm_vit('eva02_tiny_patch14_224'), 9, reads='*.qkv')
add('timm-mixer',   lambda: (MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=32), (img(),)), 9)
add('timm-resmlp',  lambda: (MlpMixer(10, 32, patch_size=8, num_blocks=2, embed_dim=32, **RESMLP), (img(),)), 7)
add('timm-swin',    tm_swin('swin_tiny_patch4_window7_224'), 18)
add('timm-swinv2',  tm_swin('swinv2_tiny_window8_256'), 26, reads='*.qkv')
add('timm-mobilenetv3', tm('mobilenetv3_small_050', 64), 0,
    skipped={'classifier': '{0} is a subclass of nn.Linear; pass types=({0},) if it computes the same'.format('timm.layers.linear.Linear')})
add('timm-maxvit',  tm('maxvit_tiny_tf_224', 64, img_size=64, embed_dim=(32,32), depths=(1,1)), 18)  # its 3-D bias tables are no layers
add('timm-convnext', tm('convnext_tiny', 64, depths=(1,1,1,1), dims=(16,24,32,32)), 9)
add('timm-efficientformer', efficientformer, 6)
add('timm-levit',   tm('levit_128s', 128, img_size=128, embed_dim=(32,48), num_heads=(2,3), depth=(1,1), key_dim=8), 15)
add('timm-cait',    tm_vit('cait_xxs24_224'), 25)
add('timm-xcit',    tm('xcit_nano_12_p16_224', img_size=32, embed_dim=32, depth=2, num_heads=4), 21)
add('timm-siglip',  tm_vit('vit_base_patch16_siglip_224'), 14)

# --- transformers
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
TEXT  = dict(vocab_size=50, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
IMAGE = dict(image_size=32, patch_size=8)

def lm(model, config, **kw): return lambda: (model(config(**{**SIZES, **TEXT, **kw})), dict(input_ids=ids()))
def seq2seq(model, config, *more, **kw):
    def f():
        x = dict(input_features=torch.randn(2, 8, 40)) if config is hf.WhisperConfig else dict(input_ids=ids())
        return model(config(**{**TEXT, **kw})), x | dict(decoder_input_ids=ids(5))
    return f
def two_towers(model, config, **kw):
    c = config(text_config={**SIZES, **TEXT}, vision_config={**SIZES, **IMAGE}, **kw)
    return lambda: (model(c), dict(pixel_values=img(), input_ids=ids()))
def frozen_body():
    m,x = ZOO['hf-vit'].make()
    m.requires_grad_(False).classifier.requires_grad_(True)
    return m, x

decoder = dict(num_key_value_heads=2)
heads = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
             decoder_ffn_dim=48, d_model=32, decoder_start_token_id=3)
t5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)

add('hf-bert',       lm(hf.BertForSequenceClassification, hf.BertConfig), 14)
add('hf-bert_mlm',   lm(hf.BertForMaskedLM, hf.BertConfig), 13,
    skipped=tied('cls.predictions.decoder', 'bert.embeddings.word_embeddings.weight'))
add('hf-distilbert', lm(hf.DistilBertForSequenceClassification, hf.DistilBertConfig,
                        n_layers=2, n_heads=4, dim=32, hidden_dim=48), 14)
add('hf-roberta',    lm(hf.RobertaForSequenceClassification, hf.RobertaConfig), 14)
add('hf-roberta_mlm', lm(hf.RobertaForMaskedLM, hf.RobertaConfig), 13,
    skipped=tied('lm_head.decoder', 'roberta.embeddings.word_embeddings.weight'))
add('hf-gpt2',       lm(hf.GPT2LMHeadModel, hf.GPT2Config), 8, skipped=tied('lm_head', 'transformer.wte.weight'))  # 8 Conv1D
add('hf-gpt2_untied', lm(hf.GPT2LMHeadModel, hf.GPT2Config, tie_word_embeddings=False), 9)
add('hf-opt',        lm(hf.OPTForCausalLM, hf.OPTConfig, ffn_dim=48, word_embed_proj_dim=16), 14,
    skipped=tied('lm_head', 'model.decoder.embed_tokens.weight'))
add('hf-llama',      lm(hf.LlamaForCausalLM, hf.LlamaConfig, **decoder), 15)
add('hf-qwen2',      lm(hf.Qwen2ForCausalLM, hf.Qwen2Config, **decoder), 15)
add('hf-qwen2_tied', lm(hf.Qwen2ForCausalLM, hf.Qwen2Config, tie_word_embeddings=True, **decoder), 14,
    skipped=tied('lm_head', 'model.embed_tokens.weight'))
add('hf-mistral',    lm(hf.MistralForCausalLM, hf.MistralConfig, **decoder), 15)
add('hf-mixtral',    lm(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=4, **decoder), 9,
    skipped={f'model.layers.{i}.mlp.experts.{w}_proj': STACKED for i in range(2) for w in ('gate_up', 'down')})
for ff,n in ('relu', 32), ('gated-gelu', 36):
    add(f'hf-t5_{ff}', seq2seq(hf.T5ForConditionalGeneration, hf.T5Config, feed_forward_proj=ff, **t5), n, reads='*.wo',
        skipped=tied('lm_head', 'shared.weight', 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'))
add('hf-bart',       seq2seq(hf.BartForConditionalGeneration, hf.BartConfig, **heads), 32,
    skipped=tied('lm_head', 'model.shared.weight', 'model.encoder.embed_tokens.weight', 'model.decoder.embed_tokens.weight'))
add('hf-whisper',    seq2seq(hf.WhisperForConditionalGeneration, hf.WhisperConfig,
                             num_mel_bins=8, max_source_positions=20, **heads), 32,
    skipped=tied('proj_out', 'model.decoder.embed_tokens.weight'))
add('hf-vit',        lambda: (hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **IMAGE)), dict(pixel_values=img())), 13)
add('hf-vit_frozen', frozen_body, 13)
add('hf-clip',       two_towers(hf.CLIPModel, hf.CLIPConfig, projection_dim=24), 26)
add('hf-siglip',     two_towers(hf.SiglipModel, hf.SiglipConfig), 28, reads='vision_model.head.attention.out_proj',
    skipped={'vision_model.head.attention.in_proj_weight': PACKED})

# --- fastai
LSTM = 'recurrent weights of LSTM'
def text(get, config, *args, **kw):
    def f(): return get(AWD_LSTM, 50, *args, config={**config, **dict(emb_sz=24, n_hid=32, n_layers=2)}, **kw), (ids(9),)
    return f

def tabular():
    df = pd.DataFrame(dict(a=list('xyzx')*4, b=range(16), c=range(16, 0, -1), y=list('uv')*8))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names='a', cont_names=['b','c'], y_names='y', bs=4)
    m = tabular_learner(dls, layers=[24, 16]).model.cpu()
    return m, (torch.tensor([[1], [2]]), torch.randn(2, 2))

def vision():
    dls = DataLoaders.from_dsets([(torch.zeros(3, 64, 64), 0)]*2, bs=2)
    learn = vision_learner(dls, tv.resnet18, n_out=3, pretrained=False, normalize=False, loss_func=nn.CrossEntropyLoss())
    return learn.model.cpu(), (img(64),)

for used in False, True:
    age = 'used' if used else 'fresh'
    add(f'fastai-awd_lstm_clas_{age}', text(get_text_classifier, awd_lstm_clas_config, 3), 2, used=used,
        skipped={f'0.module.rnns.{i}.module': LSTM for i in range(2)})
    add(f'fastai-awd_lstm_lm_{age}', text(get_language_model, awd_lstm_lm_config), 0, used=used,
        skipped={f'0.rnns.{i}.module': LSTM for i in range(2)} | tied('1.decoder', '0.encoder.weight'))
add('fastai-tabular', tabular, 3)
add('fastai-vision',  vision, 2)

# --- torch.nn
class Tagger(nn.Module):
    def __init__(self): super().__init__(); self.rnn,self.head = nn.LSTM(16, 24, 2, batch_first=True),nn.Linear(24, 10)
    def forward(self, x): return self.head(self.rnn(x)[0])

def seq(n=5): return torch.randn(2, n, 32)
def encoder(): return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
def decoder_(): return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 48, batch_first=True), 1)
def packed(*attentions): return {f'{o}.in_proj_weight'.lstrip('.'): PACKED for o in attentions}

add('nn-encoder', lambda: (encoder(), (seq(),)), 6, reads='*.out_proj *.linear1 *.linear2',
    skipped=packed('layers.0.self_attn', 'layers.1.self_attn'))
add('nn-decoder', lambda: (decoder_(), (seq(), seq(6))), 4, reads='*.out_proj',
    skipped=packed('layers.0.self_attn', 'layers.0.multihead_attn'))
add('nn-transformer', lambda: (nn.Transformer(32, 4, 1, 1, 48, batch_first=True), (seq(), seq(6))), 7,
    reads='*.out_proj encoder.*.linear1 encoder.*.linear2',
    skipped=packed('encoder.layers.0.self_attn', 'decoder.layers.0.self_attn', 'decoder.layers.0.multihead_attn'))
add('nn-attention', lambda: (nn.MultiheadAttention(32, 4, batch_first=True), (seq(),)*3), 1, reads='out_proj', skipped=packed(''))
add('nn-lstm', lambda: (Tagger(), (torch.randn(2, 5, 16),)), 1, skipped={'rnn': LSTM})

# --- Code as users write it: which layers are looked into, which only called
class Reads(nn.Module):
    def __init__(self, n=3):
        super().__init__()
        self.sizes,self.main = [8]*n,'a'
        self.a,self.b = nn.Linear(8, 8),nn.Linear(8, 8)
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(n))
    def forward(self, x):
        for o in [self.a, self.b, *self.fcs]: x = o(x)
        return self.read(x)
    def read(self, x): return x

class ReadsNothing(Reads):
    def read(self, x):
        for n,o in zip(self.sizes, self.fcs): x = o(x).relu() * n
        return getattr(self, self.main)(x)
class ReadsSlice(Reads):
    def read(self, x):
        for o in self.fcs[::-1]: x = x @ o.weight
        return x
class ReadsTuple(Reads):
    def read(self, x):
        for o in (self.a, self.b): x = x @ o.weight
        return x
class ReadsUnpacked(Reads):
    def read(self, x):
        f,g,h = self.fcs
        return x + f.bias + g.bias + h.bias
class ReadsByName(Reads):
    def read(self, x): return x @ self.get().weight
    def get(self):
        name = getattr(self, 'main', 'b')
        return getattr(self, name)
class ReadsByNumber(Reads):
    def read(self, x):
        for i in range(2): x = x @ getattr(self, 'ab'[i]).weight
        return x
class WritesWeight(Reads):
    def read(self, x):
        self.a.weight.data.renorm_(2, 0, 1.)
        for o in self.fcs: o.weight.data = o.weight.data.clamp(-0.3, 0.3)
        return x

add('code-WritesWeight', lambda: (WritesWeight(), (torch.randn(2, 8),)), 1,
    skipped=dict.fromkeys(['a', 'fcs.0', 'fcs.1', 'fcs.2'], 'WritesWeight.read writes to its weight'))
for f,reads in ((ReadsNothing, ''), (ReadsSlice, 'fcs.*'), (ReadsTuple, 'a b'), (ReadsUnpacked, 'fcs.*'), (ReadsByName, 'a'),
                (ReadsByNumber, 'a b')): add(f'code-{f.__name__}', lambda f=f: (f(), (torch.randn(2, 8),)), 5, reads=reads)

# --- Models of real size, for the meta device: structure without memory
REAL = {name: (getattr(tv, name), n) for name,n in dict(vgg16_bn=3, vit_b_16=37, swin_t=52, swin_v2_t=76, maxvit_t=90).items()}
REAL |= {name: (partial(timm.create_model, name), n) for name,n in dict(vit_base_patch16_224=49, beit_base_patch16_224=49,
    eva02_base_patch14_224=84, swinv2_tiny_window8_256=76, deit3_large_patch16_224=97).items()}
REAL |= {'bert-large': (lambda: hf.BertForMaskedLM(hf.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                                                               intermediate_size=4096)), 145),
         'llama-7b': (lambda: hf.LlamaForCausalLM(hf.LlamaConfig()), 225)}
